"""What to call the classes of a network."""

from timm.data import ImageNetInfo

_IMAGENET_CLASSES = 1000


def class_labels(classes: list[str] | None, num_classes: int) -> list[str]:
    """What people call each class: ImageNet's words where its synsets are known, else the class names or numbers.

    Args:
        classes: Class names by number, as a checkpoint tells them, or None.
        num_classes: Number of classes; 1000 without names are taken to be ImageNet-1K's.
    """
    imagenet = ImageNetInfo()
    if classes is None:
        known = num_classes == _IMAGENET_CLASSES
        return imagenet.label_descriptions() if known else list(map(str, range(num_classes)))
    return [_words(imagenet, name) for name in classes]


def _words(imagenet: ImageNetInfo, name: str) -> str:
    try:
        return imagenet.label_name_to_description(name)  # of any synset, whatever the subset
    except KeyError:
        return name
