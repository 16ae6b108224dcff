"""The kinds of context that one chunk of a text hands on to the next."""

from enum import StrEnum


class CarriedContext(StrEnum):
    """What a chunk knows of the text before it."""

    KV = "kv"
    """All that the model's cache keeps: the losses of one full forward pass. The cache of full
    attention grows with the text."""
    WINDOW = "window"
    """Attention reaches back `window` tokens in every layer: constant memory, another quantity."""
    STATE = "state"
    """Recurrent state and attention windows of the model's own: one full pass, constant memory."""
    NONE = "none"
    """Nothing but `overlap` tokens: constant memory, chunks are independent."""
