"""Object detection and instance segmentation: torchvision's detectors on this backbone, trained and scored on COCO."""
