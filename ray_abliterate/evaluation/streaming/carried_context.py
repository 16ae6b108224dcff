"""What a chunk of a text may know of the text before it."""

from enum import StrEnum


class CarriedContext(StrEnum):
    """What one chunk hands on to the next: the setting `carry`."""

    KV = "kv"
    """All that the model's cache holds: the losses are those of one full forward pass. The cache of
    full attention grows with the text."""
    WINDOW = "window"
    """Attention reaches back `window` tokens in every layer: constant memory, another quantity."""
    STATE = "state"
    """The model's own recurrent state and attention windows: the losses of one full forward pass,
    in constant memory."""
    NONE = "none"
    """Nothing but `overlap` tokens of context: constant memory, independent chunks."""
