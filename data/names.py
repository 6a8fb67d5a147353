"""What to call the classes of a network."""

from timm.data import ImageNetInfo

_IMAGENET_CLASSES = 1000


def class_labels(classes: list[str] | None, num_classes: int) -> list[str]:
    """What people call each class: ImageNet's words where its synsets are known, else the class names or numbers.

    Args:
        classes: Class names by number, as a checkpoint tells them, or None.
        num_classes: Number of classes; 1000 without names are taken to be ImageNet-1K's.
    """
    if classes is None:
        return (
            ImageNetInfo().label_descriptions()
            if num_classes == _IMAGENET_CLASSES
            else list(map(str, range(num_classes)))
        )
    known = ImageNetInfo("imagenet-22k").label_descriptions(as_dict=True) | ImageNetInfo().label_descriptions(
        as_dict=True
    )
    return [known.get(name, name) for name in classes]
