"""tools/benchmark.py: the literal form, what is counted and timed, what is reported and refused."""

import errno
import json
import os
from argparse import Namespace
from dataclasses import replace

import pytest
import timm
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from timm.layers import DropPath
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models import GroupMixFormer
from models.fuse import FusedProxy
from models.published import to_published
from tests import reference
from tests.fixtures.fill import fill, images
from tools.benchmark import report
from tools.benchmarking import ceiling, timing
from tools.benchmarking.chart import draw_chart
from tools.benchmarking.cost import count_work, peak_memory
from tools.benchmarking.literal import LiteralGroupMixFormer
from tools.benchmarking.measure import Result, Settings, measure
from tools.benchmarking.networks import build_network, in_form
from tools.benchmarking.report import as_json, markdown
from tools.benchmarking.subjects import Step, Subject, plan
from utils.errors import UserError

CPU = torch.device("cpu")
MACHINE = {"cpu": "a processor", "cores": 2, "threads": 1, "torch": "2"}
FORMS = {"fused": False, "recomputed": False}
OURS = Subject("ours", "plain", "infer", "fp32", False, 4)


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    """A matrix and a copy that take no time."""
    monkeypatch.setitem(ceiling._MATRIX, "cpu", 16)
    monkeypatch.setitem(ceiling._COPIED, "cpu", 1024)


def tiny(**settings) -> GroupMixFormer:
    torch.manual_seed(0)
    sizes = {"embed_dims": (40,) * 4, "depths": (1,) * 4, "mlp_ratios": (2,) * 4, "num_classes": 7}
    return GroupMixFormer(**(sizes | settings))


def small_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def result(subject: Subject = OURS, *rounds_s: float, **settings) -> Result:
    ceilings = {"arithmetic_ceiling": [100.0] * len(rounds_s), "copy_ceiling": [10.0] * len(rounds_s)}
    return Result(subject, **{"flops": 20.0, "bytes": 4.0, "rounds_s": list(rounds_s), **ceilings, **settings})


class TestLiteralForm:
    @pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
    @pytest.mark.parametrize(("height", "width"), [(33, 47), (65, 40)])
    def test_equals_the_network_and_the_reference_forward_and_backward(self, height, width, training):
        model = tiny(embed_dims=(40, 80, 40, 120), depths=(2, 1, 2, 1), mlp_ratios=(4, 2, 3, 1))
        model.load_state_dict(fill(to_published(model.state_dict())))
        model = model.double().train(training)
        state = {name: tensor.clone() for name, tensor in to_published(model.state_dict()).items()}
        x = images(3, height, width, seed=height).double().requires_grad_()
        logits, gradients = {}, {}
        for name, network in {"literal": LiteralGroupMixFormer(model), "plain": model}.items():
            logits[name] = network(x)
            loss = (logits[name] * torch.arange(21).reshape(3, 7).cos()).sum()
            gradients[name] = torch.autograd.grad(loss, [x, *network.parameters()])
        expected = reference.network(state, x, training).logits
        scale = expected.abs().max()
        assert (logits["literal"] - expected).abs().max() < 1e-10 * scale
        assert (logits["literal"] - logits["plain"]).abs().max() < 1e-10 * scale
        largest = max(gradient.abs().max() for gradient in gradients["plain"])
        for ours, theirs in zip(gradients["literal"], gradients["plain"], strict=True):
            assert (ours - theirs).abs().max() < 1e-10 * largest

    def test_has_the_networks_own_tensors_under_the_same_names(self):
        model = tiny()
        ours, theirs = LiteralGroupMixFormer(model).state_dict(), model.state_dict()
        assert list(ours) == list(theirs)
        assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in ours)


class TestPlan:
    def test_ours_is_always_measured_beside_its_eager_literal_form(self):
        networks = {"ours": tiny(), "peer": small_net()}
        labels = [subject.label for subject in plan(networks, ["infer"], ["fp32"], [2], compiled=True, **FORMS)]
        assert labels == ["ours literal", "ours", "ours compiled", "peer", "peer compiled"]

    def test_the_fused_form_is_for_inference_only(self):
        subjects = plan(
            {"ours": tiny()}, ["infer", "train"], ["fp32", "bf16"], [1, 2], compiled=False, **FORMS | {"fused": True}
        )
        assert {subject.mode for subject in subjects if subject.form == "fused"} == {"infer"}
        assert len(subjects) == len(set(subjects)) == 4 * 3 + 4 * 2

    def test_the_recomputed_form_is_for_training_only_and_eager(self):
        settings = {"compiled": True, "fused": False, "recomputed": True}
        subjects = plan({"ours": tiny(), "peer": small_net()}, ["infer", "train"], ["fp32"], [2], **settings)
        (recomputed,) = [subject for subject in subjects if subject.form == "recomputed"]
        assert (recomputed.network, recomputed.mode, recomputed.compiled) == ("ours", "train", False)

    def test_networks_are_built_without_drop_path_whatever_their_default(self):
        network = build_network("swin_tiny_patch4_window7_224", 224)
        assert any(
            module.drop_prob
            for module in timm.create_model("swin_tiny_patch4_window7_224").modules()
            if isinstance(module, DropPath)
        )
        assert not any(module.drop_prob for module in network.modules() if isinstance(module, DropPath))


class TestStep:
    def test_leaves_the_given_network_alone(self):
        network = tiny()
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        for form in ("plain", "literal"):
            Step(replace(OURS, form=form, mode="train"), network, 32, CPU)()
        assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
        assert all(parameter.grad is None for parameter in network.parameters())

    def test_takes_other_images_each_time_and_the_same_in_every_form(self):
        seen = {}
        for form in ("plain", "literal"):
            step = Step(replace(OURS, form=form), tiny(), 32, CPU)
            seen[form] = []
            step._network.stem.register_forward_pre_hook(lambda _, args, to=seen[form]: to.append(args[0]))
            for _ in range(4):
                step()
        assert not torch.equal(seen["plain"][0], seen["plain"][1])
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*seen.values(), strict=True))
        assert seen["plain"][0].is_contiguous(memory_format=torch.channels_last)
        assert seen["literal"][0].is_contiguous()

    def test_a_training_step_updates_all_forms_alike(self):
        weights = {}
        for form in ("plain", "literal"):
            step = Step(replace(OURS, form=form, mode="train"), tiny(), 32, CPU)
            step()
            weights[form] = step._network.state_dict()
        before = tiny().state_dict()["head.fc.weight"]
        assert not torch.equal(weights["plain"]["head.fc.weight"], before)
        assert torch.allclose(weights["plain"]["head.fc.weight"], weights["literal"]["head.fc.weight"], atol=1e-5)

    def test_the_fused_form_answers_as_the_plain_one_and_leaves_it_alone(self):
        network = tiny().eval()
        fused = in_form(network, "fused")
        assert any(isinstance(module, FusedProxy) for module in fused.modules())
        assert not any(isinstance(module, FusedProxy) for module in network.modules())
        x = images(1, 32, 32)
        torch.testing.assert_close(fused(x), network(x))

    def test_the_recomputed_form_takes_the_same_step_in_less_memory(self):
        memory, weights = {}, {}
        for form in ("plain", "recomputed"):
            step = Step(replace(OURS, form=form, mode="train"), tiny(), 64, CPU)
            step()
            weights[form] = step._network.state_dict()["head.fc.weight"].clone()
            memory[form] = peak_memory(step, CPU)
        assert torch.equal(weights["plain"], weights["recomputed"])
        assert memory["recomputed"] < 0.8 * memory["plain"]


class TestCost:
    def test_operations_are_those_that_torch_counts(self):
        network = tiny().eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.randn(1, 3, 48, 40))
        assert count_work(network, 48).flops > counter.get_total_flops()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.randn(1, 3, 48, 48))
        assert count_work(network, 48).flops == counter.get_total_flops()

    def test_all_forms_have_the_same_operations(self):
        assert count_work(LiteralGroupMixFormer(tiny()), 40).flops == count_work(tiny(), 40).flops

    def test_bytes_are_each_operand_once_and_weights_once_a_batch(self):
        work = count_work(small_net(), 5)
        convolution, linear = 3 * 5 * 5 + 4 * 3 * 3, 4 + 2
        weights = 4 * 3 * 9 + 4 + 4 * 2 + 2
        assert (work.elements, work.weights) == (convolution + linear, weights)
        assert work.of_step("infer", "fp32", 10) == (10 * work.flops, 4 * (10 * (convolution + linear) + weights))
        flops, read_and_written = work.of_step("infer", "bf16", 10)
        assert work.of_step("train", "bf16", 10) == (3 * flops, 3 * read_and_written)

    def test_peak_memory_is_what_lives_at_once(self):
        held = torch.zeros(1000)

        def step():
            first = torch.zeros(1000)
            second = first + held
            del first
            return torch.ones(500) * second[:500]

        assert peak_memory(step, CPU) == 4 * (1000 + 1000)
        assert peak_memory(lambda: held.add_(held), CPU) == 0

    def test_peak_memory_of_training_has_the_gradients_in_every_step(self):
        step = Step(replace(OURS, mode="train"), small_net(), 8, CPU)
        step()
        assert all(parameter.grad is None for parameter in step._network.parameters())
        assert peak_memory(step, CPU) == peak_memory(step, CPU)


class TestRounds:
    @pytest.fixture
    def clock(self, monkeypatch):
        """Steps say how long they took."""
        monkeypatch.setattr(timing, "time_calls", lambda step, calls, device: sum(step() for _ in range(calls)) / calls)

    def test_all_take_turns_in_an_order_that_moves_on(self, clock):
        seen = []
        steps = {name: lambda name=name: seen.append(name) or 1.0 for name in "abc"}
        times, failures = timing.interleave(steps, 4, 1.0, CPU)
        assert "".join(seen) == "abc" + "abc" + "bca" + "cab" + "abc"
        assert times == {name: [1.0] * 4 for name in "abc"} and not failures

    def test_a_measurement_has_as_many_steps_as_its_time_allows_and_at_least_one(self, clock):
        seen = []
        steps = {name: lambda name=name, s=s: seen.append(name) or s for name, s in (("fast", 0.1), ("slow", 9.0))}
        timing.interleave(steps, 1, 1.0, CPU)
        assert (seen.count("fast"), seen.count("slow")) == (1 + 10, 1 + 1)

    def test_a_step_that_runs_out_of_memory_leaves_the_others_going(self, clock):
        calls = []

        def greedy():
            calls.append(1)
            if len(calls) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
            return 1.0

        times, failures = timing.interleave({"greedy": greedy, "other": lambda: 1.0}, 3, 1.0, CPU)
        assert times == {"other": [1.0] * 3}
        assert failures == {"greedy": "out of memory"} and len(calls) == 3

    @pytest.mark.parametrize("kind", [RuntimeError, ValueError, KeyError])
    def test_another_error_is_told_and_leaves_the_others_going_too(self, clock, kind):
        def broken():
            raise kind("shapes do not fit")

        times, failures = timing.interleave({"broken": broken, "other": lambda: 1.0}, 2, 1.0, CPU)
        assert times == {"other": [1.0] * 2}
        assert "shapes do not fit" in failures["broken"]

    def test_the_clock_gives_seconds_of_one_call(self, monkeypatch):
        moments = iter([5.0, 11.0])
        monkeypatch.setattr(timing.time, "perf_counter", lambda: next(moments))
        calls = []
        assert timing.time_calls(lambda: calls.append(1), 3, CPU) == 2.0
        assert len(calls) == 3


class TestResult:
    def test_speed_is_the_median_and_spread_half_the_quartiles_distance(self):
        measured = result(OURS, 1.0, 2.0, 3.0, 4.0, 100.0)
        assert measured.images_per_s == pytest.approx(4 / 3)
        assert measured.spread == pytest.approx((4 - 2) / 2 / 3)
        assert result(OURS, 2.0).spread == 0

    def test_a_ratio_is_taken_round_by_round(self):
        ours, drifting = result(OURS, 1.0, 10.0, 1.0), result(replace(OURS, batch_size=8), 4.0, 40.0, 4.0)
        assert ours.speed_over(drifting) == pytest.approx(2)

    def test_shares_are_of_the_ceilings_of_the_same_round(self):
        measured = result(OURS, 1.0, 2.0, arithmetic_ceiling=[100.0, 50.0], copy_ceiling=[10.0, 5.0])
        assert measured.arithmetic_share == pytest.approx(0.2)
        assert measured.bytes_share == pytest.approx(0.4)


class TestMeasure:
    SETTINGS = Settings(CPU, 32, rounds=2, seconds=1e-4)

    def test_every_subject_has_its_rounds_and_the_ceilings_of_its_group(self):
        networks = {"ours": tiny(), "peer": small_net()}
        subjects = plan(networks, ["infer", "train"], ["fp32", "bf16"], [2], compiled=False, **FORMS)
        results = measure(networks, subjects, self.SETTINGS, say=str)
        assert [r.subject for r in results] == subjects
        for r in results:
            assert len(r.rounds_s) == len(r.arithmetic_ceiling) == len(r.copy_ceiling) == 2
            assert min(r.rounds_s) > 0 and r.first_s > 0 and r.memory > 0 and not r.failure
        by_subject = {r.subject: r for r in results}
        for r in results:
            if r.subject.mode == "train":
                assert r.flops == 3 * by_subject[replace(r.subject, mode="infer")].flops

    def test_a_network_that_does_not_fit_in_memory_is_reported_beside_the_others(self):
        class Greedy(nn.Module):
            def forward(self, x):
                if not x.is_meta:
                    torch.empty(2**60, dtype=torch.uint8)
                return x

        networks = {"greedy": Greedy(), "peer": small_net()}
        subjects = plan(networks, ["infer"], ["fp32"], [2], compiled=False, **FORMS)
        greedy, peer = measure(networks, subjects, self.SETTINGS, say=str)
        assert (greedy.failure, greedy.rounds_s) == ("out of memory", [])
        assert len(peer.rounds_s) == 2 and not peer.failure

    def test_a_network_that_cannot_do_a_step_is_reported_and_its_other_steps_are_measured(self, tmp_path):
        """Batch norms behind the pooling cannot be trained on one image."""
        networks = {"peer": nn.Sequential(small_net(), nn.BatchNorm1d(2))}
        subjects = plan(networks, ["infer", "train"], ["fp32"], [1], compiled=False, **FORMS)
        inferred, trained = results = measure(networks, subjects, self.SETTINGS, say=str)
        assert len(inferred.rounds_s) == 2 and not inferred.failure
        assert "Expected more than 1 value" in trained.failure and not trained.rounds_s
        assert trained.failure in markdown(results, None, MACHINE, 32)
        draw_chart(results, tmp_path / "speed.png", MACHINE)

    def test_a_device_without_room_for_its_ceilings_is_told_of_before_anything_is_measured(self, monkeypatch):
        monkeypatch.setitem(ceiling._COPIED, "cpu", 2**60)
        subjects = plan({"peer": small_net()}, ["infer"], ["fp32"], [1], compiled=False, **FORMS)
        lines = []
        with pytest.raises(UserError, match=r"the ceilings cannot be measured \(out of memory\): free the device"):
            measure({"peer": small_net()}, subjects, self.SETTINGS, say=lines.append)
        assert not lines

    def test_a_ceiling_that_fails_later_leaves_the_numbers_of_other_modes(self, monkeypatch):
        product, calls = torch.mm, []

        def failing(*arguments, **settings):
            if calls:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return product(*arguments, **settings)

        monkeypatch.setattr(torch, "mm", failing)
        subjects = plan({"peer": small_net()}, ["infer", "train"], ["fp32"], [1], compiled=False, **FORMS)

        def say(line):
            calls.extend([line] if ", train" in line else [])

        inferred, trained = results = measure({"peer": small_net()}, subjects, self.SETTINGS, say=say)
        assert len(inferred.rounds_s) == 2 and not inferred.failure
        assert (trained.failure, trained.rounds_s) == ("no ceiling of fp32: out of memory", [])
        assert trained.failure in markdown(results, None, MACHINE, 32)

    def test_compiled_inference_on_a_cpu_is_of_whole_networks_with_frozen_weights(self, monkeypatch):
        compiled = []

        def compile_(network, **_):
            compiled.append((type(network), torch._inductor.config.freezing))
            return network

        monkeypatch.setattr(torch, "compile", compile_)
        networks = {"ours": tiny(), "peer": small_net()}
        subjects = plan(networks, ["infer"], ["fp32"], [2], compiled=True, **FORMS)
        assert len(measure(networks, subjects, self.SETTINGS, say=str)) == 5
        assert compiled == [(GroupMixFormer, True), (nn.Sequential, True)]
        assert not torch._inductor.config.freezing


class TestReport:
    LITERAL, PEER = replace(OURS, form="literal"), replace(OURS, network="peer")

    def results(self):
        failed = replace(OURS, compiled=True)
        return [
            result(self.LITERAL, 2.0, 2.0, memory=2**20),
            result(OURS, 1.0, 1.0, first_s=3.0, memory=2**19),
            result(failed, failure="out of memory"),
            result(self.PEER, 0.5, 0.5, memory=1),
        ]

    def test_tables_compare_with_the_literal_form_and_the_peer(self):
        text = markdown(self.results(), "peer", MACHINE, 224)
        rows = {line.split(" | ")[0].lstrip("| "): line.strip("| ").split(" | ") for line in text.splitlines()}
        assert "**inference, fp32, batch 4**" in text and "a processor, 2 cores, 1 thread, torch 2;" in text
        assert rows["ours literal"][1:5] == ["2.00", "0.0%", "2,000", "1.00"]
        assert rows["ours"][4:6] == ["0.500", "0.50"]
        assert rows["ours"][7:] == ["40% bytes", "2.00", "0.50", "3.00"]
        assert rows["ours compiled"][1].strip() == "out of memory"
        widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
        assert len(widths) == 1

    def test_the_best_way_is_named_against_the_literal_form_in_each_precision(self):
        half = [result(replace(self.LITERAL, precision="bf16"), 0.5, 0.5, memory=1)]
        half += [result(replace(OURS, precision="bf16", compiled=True), 0.25, 0.25)]
        text = markdown([*self.results(), *half], None, MACHINE, 224)
        line = "- best inference at batch 4: ours compiled, bf16; over the literal form 8.00 in fp32, 2.00 in bf16"
        assert line in text.splitlines()

    def test_json_has_every_number_and_what_failed(self):
        written = json.loads(json.dumps(as_json(self.results(), MACHINE, {"rounds": 2})))
        assert written["machine"] == MACHINE
        entries = written["results"]
        assert entries[1]["images_per_s"] == 4 and entries[1]["rounds_s"] == [1.0, 1.0]
        assert entries[1]["arithmetic_ceiling"] == [100.0, 100.0] and entries[1]["form"] == "plain"
        assert entries[2]["failure"] == "out of memory" and "images_per_s" not in entries[2]

    def test_the_chart_has_a_row_for_each_mode_and_a_column_for_each_batch_size(self, tmp_path):
        results, pictures = self.results(), {}
        trained = [replace(r, subject=replace(r.subject, mode="train")) for r in results]
        larger = [replace(r, subject=replace(r.subject, batch_size=8)) for r in results]
        for name, shown in (("one", results), ("rows", results + trained), ("columns", results + larger)):
            draw_chart(shown, tmp_path / name, MACHINE)
            pictures[name] = Image.open(tmp_path / name).convert("RGB")
        assert pictures["rows"].width == pictures["one"].width and pictures["rows"].height > pictures["one"].height
        assert pictures["columns"].height == pictures["one"].height and pictures["columns"].width > 1000
        assert len(pictures["one"].getcolors(10**6)) > 20

    def test_a_chart_that_cannot_be_written_takes_no_numbers_with_it(self, tmp_path, monkeypatch, capsys):
        def disk_full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(FigureCanvasAgg, "print_png", disk_full)
        files = {name: tmp_path / f"speed.{name}" for name in ("json", "markdown", "png")}
        with pytest.raises(UserError, match=r"speed\.png cannot be written \(.*No space left on device\)"):
            report(Namespace(vs=[], img_size=224, **files), self.results(), MACHINE)
        assert "| ours |" in capsys.readouterr().out
        assert len(json.loads(files["json"].read_text())["results"]) == 4
        assert sorted(path.name for path in tmp_path.iterdir()) == ["speed.json", "speed.markdown"]


class TestProgram:
    @pytest.mark.parametrize(
        ("words", "told"),
        [
            (["--model", "groupmixformer_smal"], "groupmixformer_small"),
            (["--vs", "no-such-network"], "no network no-such-network"),
            (["--vs", "convnext_atto", "--img-size", "1"], "convnext_atto cannot be run on 1 x 1"),
            (["--device", "cpu", "--precision", "fp32", "fp16"], "--precision fp16"),
            (["--batch-size", "8", "0"], "--batch-size: 0"),
            (["--rounds", "0"], "--rounds: 0"),
            (["--seconds", "0"], "--seconds 0"),
            (["--seconds", "inf"], "--seconds inf"),
            (["--loader", "--data-path", ".", "--gpu-speed", "100", "nan"], "--gpu-speed nan"),
            (["--loader", "--data-path", ".", "--gpu-speed", "inf"], "--gpu-speed inf"),
            (["--json", "no/such/folder/f.json"], "--json no/such/folder/f.json"),
            (["--png", "speed.jpg"], "--png speed.jpg: end the name in .png"),
            (["--profile", __file__], f"--profile {__file__}: is a file"),
            (["--mode", "guess"], "--help"),
        ],
    )
    def test_a_wrong_flag_ends_in_one_line_that_names_it(self, call, words, told):
        ended = call("tools/benchmark.py", *words)
        assert ended.code == 2
        assert len(ended.errors) == 1 and told in ended.errors[0]

    def test_a_gpu_that_is_not_there_is_refused(self, call, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert "use --device cpu" in call("tools/benchmark.py", "--device", "cuda").errors[0]

    @pytest.mark.slow
    def test_a_run_prints_its_tables_and_writes_all_that_is_asked_for(self, call, tmp_path):
        files = {name: tmp_path / f"speed.{name}" for name in ("json", "png", "markdown")}
        ended = self.start(call, tmp_path, "cpu", "fp32", *(w for n, path in files.items() for w in (f"--{n}", path)))
        assert ended.code == 0, ended.stderr
        assert ended.stdout == files["markdown"].read_text()
        for label in ("groupmixformer_miny literal", "groupmixformer_miny", "convnext_atto"):
            assert ended.stdout.count(f"| {label} |") == 1
        written = json.loads(files["json"].read_text())
        assert len(written["results"]) == 3 and written["settings"]["img_size"] == 32
        assert files["png"].exists()
        assert {path.suffix for path in (tmp_path / "profiles").iterdir()} == {".txt", ".json"}
        assert "convolution" in (tmp_path / "profiles" / "convnext_atto_infer_fp32_batch_2.txt").read_text()

    @pytest.mark.gpu
    def test_a_run_on_a_gpu_measures_compiled_training_in_half_precision(self, call, tmp_path):
        more = ("--mode", "infer", "train", "--compile", "--json", tmp_path / "speed.json")
        ended = self.start(call, tmp_path, "cuda", "bf16", *more)
        assert ended.code == 0, ended.stderr
        results = json.loads((tmp_path / "speed.json").read_text())["results"]
        assert len(results) == 10 and not any(entry["failure"] for entry in results)
        assert all(entry["memory"] > 0 and min(entry["rounds_s"]) > 0 for entry in results)

    @staticmethod
    def start(call, folder, device, precision, *more):
        words = [
            "--model",
            "groupmixformer_miny",
            "--vs",
            "convnext_atto",
            "--device",
            device,
            "--precision",
            precision,
        ]
        words += ["--batch-size", 2, "--img-size", 32, "--rounds", 2, "--seconds", 1e-4]
        return call("tools/benchmark.py", *words, "--profile", folder / "profiles", *more)
