PYTHON ?= python3
SEED ?= 0
BIN := .venv/bin
DIGITS := data-digits
SCENES := data-scenes
RUN := output/digits/seed$(SEED)
SEGMENTATION := output/scenes_segmentation/seed$(SEED)
DETECTION := output/scenes_detection/seed$(SEED)
TRAIN = --cfg configs/digits.yaml --data-path $(DIGITS) --output output --tag seed$(SEED)

.PHONY: demo demo-segmentation demo-detection test test-fast test-lowest test-gpu lint clean

# Train on scikit-learn's handwritten digits and score what was trained. SEED=1 chooses another seed.
demo: .venv/.installed
	$(BIN)/python tools/prepare_digits.py $(DIGITS)
	$(BIN)/python train.py $(TRAIN) --seed $(SEED)
	$(BIN)/python test.py --cfg configs/digits.yaml --data-path $(DIGITS) --resume $(RUN)/best.pth
	@echo
	@echo "log         $(RUN)/log_rank0.txt"
	@echo "curves      $(RUN)/curves.png      (TensorBoard: tensorboard --logdir $(RUN)/runs)"
	@echo "checkpoint  $(RUN)/best.pth"
	@echo
	@echo "Next, ImageNet (D holds train/ and val/, one folder a class):"
	@echo "  $(BIN)/torchrun --nproc_per_node 8 train.py --cfg configs/groupmixformer_small.yaml --data-path D --output output"

# Tell digits from the ground, pixel by pixel, in scenes that are composed of them, and draw what was told.
demo-segmentation: .venv/.installed
	$(BIN)/python tools/prepare_digits.py $(SCENES) --scenes
	$(BIN)/python segmentation/train.py --cfg configs/segmentation/scenes.yaml --data-path $(SCENES)/ade --output output \
	  --tag seed$(SEED) --seed $(SEED)
	$(BIN)/python segmentation/test.py --cfg configs/segmentation/scenes.yaml --data-path $(SCENES)/ade \
	  --resume $(SEGMENTATION)/best.pth --save-pictures $(SEGMENTATION)/pictures
	@echo
	@echo "pictures    $(SEGMENTATION)/pictures/overview.png, and comparisons/ of the first scenes beside it"
	@echo "curves      $(SEGMENTATION)/curves.png"
	@echo "checkpoint  $(SEGMENTATION)/best.pth"

# Find digits in scenes that are composed of them, with Mask R-CNN, and draw what was found.
demo-detection: .venv/.installed
	$(BIN)/python tools/prepare_digits.py $(SCENES) --scenes
	$(BIN)/python detection/train.py --cfg configs/detection/scenes.yaml --data-path $(SCENES)/coco --output output \
	  --tag seed$(SEED) --seed $(SEED)
	$(BIN)/python detection/test.py --cfg configs/detection/scenes.yaml --data-path $(SCENES)/coco \
	  --resume $(DETECTION)/best.pth --save-pictures $(DETECTION)/pictures
	@echo
	@echo "pictures    $(DETECTION)/pictures/overview.png, and comparisons/ of the first scenes beside it"
	@echo "curves      $(DETECTION)/curves.png"
	@echo "checkpoint  $(DETECTION)/best.pth"

# The whole suite, linting included. Two tests at a time, each on one thread.
test: .venv/.installed lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not gpu"

# Without the tests that are marked slow.
test-fast: .venv/.installed lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not gpu and not slow"

# The suite with the lowest versions that the requirements allow, on a Python that has all of them, 3.10 or 3.11. Export,
# which asks for a newer torch than the rest, is left out.
test-lowest: .venv-lowest/.installed
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -q -n 2 -m "not gpu" --ignore tests/test_export.py

# What needs a CUDA device, on a machine that has one.
test-gpu: .venv/.installed
	$(BIN)/python -m pytest -q -m gpu

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/.installed: requirements.txt requirements-downstream.txt requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade -r requirements.txt -r requirements-downstream.txt -r requirements-dev.txt
	touch $@

.venv-lowest/.installed: requirements.txt requirements-downstream.txt requirements-dev.txt
	$(PYTHON) -m venv --clear .venv-lowest
	awk -F '>=|[, ]' '/>=/ && !seen[$$1]++ {print $$1 "==" $$2}' $^ > .venv-lowest/lowest.txt
	.venv-lowest/bin/python -m pip install --quiet -r .venv-lowest/lowest.txt
	touch $@

clean:
	rm -rf output $(DIGITS) $(SCENES) .pytest_cache .ruff_cache .hypothesis
