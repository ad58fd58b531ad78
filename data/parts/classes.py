"""Class ids of guidance: a topic for every token, and the id behind the last one for no topic.

diffusion.py embeds them; read that next.
"""


def spread_classes(class_ids, ids, classes: int):
    """class_ids (B,) or (B, T) -> (B, T) beside ids (B, T); None stays None.

    Raises ValueError for an id that is not in [0, classes].
    """
    if class_ids is None:
        return None
    check_classes(class_ids, classes)
    return class_ids.view(len(ids), -1).expand_as(ids)


def check_classes(class_ids, classes: int):
    """Raise ValueError for classes that the path was not made with."""
    some = class_ids.flatten().tolist()[:4]
    if not classes:
        raise ValueError(f"class ids {some} were given, but this path has no classes; "
                         "allowed: None")
    if class_ids.min() < 0 or class_ids.max() > classes:
        raise ValueError(f"class ids {some} are out of range; allowed: 0 to {classes}")


def drop_classes(class_ids, share: float, no_class: int, draws):
    """Hide a share of the classes (N,), position by position as in the official code."""
    return class_ids.masked_fill(draws.uniform() < share, no_class)
