"""The recipe's `[model]`: which model, and how each replica holds it; see `recipe/recipe.py`."""

import re
from typing import Literal, get_args

from pydantic import Field, field_validator, model_validator

from ray_abliterate.recipe.section import Section

Component = Literal["attn", "mlp", "experts", "shared_experts", "mixer", "linear_attn"]
COMPONENT_NAMES = get_args(Component)
Quantization = Literal["nf4", "int8", "torchao-int8", "torchao-int4"]
MEMORY_SIZE = re.compile(r"^\d+(\.\d+)?([KMGT]i?B)$")


class WriterSettings(Section):
    """A parameter of an unknown family that writes to the residual stream."""

    pattern: str
    """Regular expression for the parameter's whole name inside its block."""
    component: Component
    """The component it belongs to."""
    hidden_axis: int = Field(0, ge=0, le=2)
    """The axis with the width of the residual stream: 0 for `nn.Linear`."""
    post_norm: str | None = None
    """Name, inside the block, of a norm between the writer and the stream, if there is one."""
    outer_norm: str | None = None
    """Name, inside the block, of a second norm after `post_norm`."""
    bias: str | None = None
    """Name, inside the block, of the writer's bias, if it does not stand next to the weight."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{value!r} is not a regular expression: {error}") from None
        return value


class ModelSettings(Section):
    """Which model is edited, and how each replica holds it."""

    name: str = Field(min_length=1)
    """A Hub name, a local folder, `demo` (the built-in model) or `planted` (a tiny toy)."""
    revision: str | None = None
    """Commit, tag or branch of the Hub repository; pinned in `environment.json` either way."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto` is the checkpoint's own dtype."""
    quantization: Quantization | None = None
    """Quantize linear layers while they are loaded, to search in less memory: `nf4` (4 bits) and
    `int8` with bitsandbytes, `torchao-int8` and `torchao-int4` with torchao. Exports have full
    precision."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Set it only for models whose authors you trust."""
    attention: str | None = None
    """Attention implementation for transformers (`sdpa`, `eager`, …); its own choice if unset."""
    chat_template: str | None = None
    """A file with a Jinja chat template, for models that have none; `plain` for no template."""
    enable_thinking: bool | None = None
    """Passed to the chat template if set, for models whose thinking can be switched."""
    gpus_per_replica: float | None = Field(None, ge=0)
    """GPUs of one replica: a fraction shares a card, 2 or more split the model. One if unset."""
    replicas: int | None = Field(None, ge=1)
    """Replicas of the model. If unset, as many as the GPUs allow; without GPUs, as many as cores (8
    for each) and memory allow."""
    threads_per_replica: int | None = Field(None, ge=1)
    """CPU threads of a replica. If unset, a node's cores divided by its replicas."""
    max_memory: dict[str, str] | None = None
    """Memory that a replica's weights may use on each device, as `{ 0 = "14GiB", cpu = "30GiB" }`.
    What does not fit on GPUs stays in CPU memory, and after that on disk: it works, slowly."""
    weight_cache: Literal["auto", "node", "device", "cpu"] = "auto"
    """Where pristine weights are stored: `node` in the node's object store, one copy for all its
    replicas; `device` on the device of each model; `cpu` in (pinned) CPU memory. `auto` is `node`
    without GPUs and `device` with GPUs."""
    writers: tuple[WriterSettings, ...] = ()
    """Writers of a family that is not in the table; see `docs/architectures.md`."""

    def cache_location(self, on_gpu: bool) -> Literal["node", "device", "cpu"]:
        """Return where pristine weights are stored, with `auto` resolved."""
        if self.weight_cache == "auto":
            return "device" if on_gpu else "node"
        return self.weight_cache

    @field_validator("gpus_per_replica")
    @classmethod
    def _whole_above_one(cls, value: float | None) -> float | None:
        if value is not None and value > 1 and value != int(value):
            raise ValueError(f"{value} must be a fraction below 1, or a whole number of GPUs")
        return value

    @field_validator("max_memory")
    @classmethod
    def _memory_is_readable(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        for device, size in (value or {}).items():
            if not (device.isdigit() or device in ("cpu", "mps")):
                raise ValueError(
                    f"{device!r} is not a device; give the number of a GPU, `cpu` or `mps`"
                )
            if not MEMORY_SIZE.match(size):
                raise ValueError(f"{device} = {size!r} is not a size; write `14GiB` or `600MB`")
        return value

    @model_validator(mode="after")
    def _memory_has_its_gpus(self) -> "ModelSettings":
        cards = [device for device in self.max_memory or {} if device.isdigit()]
        if cards and self.gpus_per_replica == 0:
            raise ValueError(
                f"max_memory names GPU {cards[0]}, but gpus_per_replica = 0; drop one of them"
            )
        return self
