"""Keep optional packages from being imported merely because they are installed.

transformers imports torchao with its first model class, and PEFT imports bitsandbytes and torchao
with its first adapter, whether the model needs them or not: seconds, and warnings about files that
torchao cannot load. A process of our own (a command, a replica) hides them first, and reveals those
that its checkpoint is quantized with. A program that uses this package as a library hides nothing.
"""

import sys

HIDDEN = ("torchao", "bitsandbytes")


def hide_optional_packages() -> None:
    """Make packages that nothing has imported yet look as if they were not installed."""
    for name in HIDDEN:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # what import takes for absent


def reveal_package(module: str) -> None:
    """Make a hidden package importable again; others are left as they are."""
    name = module.partition(".")[0]
    if name in sys.modules and sys.modules[name] is None:
        del sys.modules[name]
