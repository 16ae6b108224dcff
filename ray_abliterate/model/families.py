"""The table of families: which parameters of a block write to the residual stream, as data.

Knows names only: no torch, no transformers. `architecture` reads the table, and
`ray_abliterate.testing.architecture` proves every line of it on a tiny random model.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class WriterRow:
    r"""A kind of writer.

    Attributes:
        pattern: Regex for the whole name of the parameter relative to its block, such as
            `mlp\.down_proj\.weight`.
        component: One of `recipe.COMPONENT_NAMES`.
        hidden_axis: The axis in residual units: 0 for Linear (out, in), 1 for Conv1D (in, out) and
            for experts (expert, out, in), 2 for experts (expert, in, out).
        post_norm: Name, relative to the block, of a norm between the writer and the stream. A name
            that ends in `?` counts in those blocks only that have such a norm.
        outer_norm: A second norm, after `post_norm`.
        bias: Name of the bias relative to the block, where it is not the writer's own name with
            `.bias` in place of `.weight`, or with `_bias` at the end.
    """

    pattern: str
    component: str
    hidden_axis: int = 0
    post_norm: str | None = None
    outer_norm: str | None = None
    bias: str | None = None


@dataclass(frozen=True)
class Family:
    """Model types whose blocks write in the same way. A row need not match in every block."""

    model_types: tuple[str, ...]
    rows: tuple[WriterRow, ...]


@dataclass(frozen=True)
class Unsupported:
    """A model type for which no edit of writers removes a direction, and why.

    Attributes:
        model_type: The type of the text tower.
        reason: Completes the sentence "… is not supported: …".
        setting: Only where the configuration has this attribute at `value`; None is always.
        value: See `setting`.
    """

    model_type: str
    reason: str
    setting: str | None = None
    value: Any = None


def _types(names: str) -> tuple[str, ...]:
    return tuple(names.split())


ATTN = WriterRow(r"self_attn\.o_proj\.weight", "attn")
MLP = WriterRow(r"mlp\.down_proj\.weight", "mlp")
EXPERTS = WriterRow(r"mlp\.experts\.down_proj", "experts", hidden_axis=1)
SHARED = WriterRow(r"mlp\.shared_(expert|experts|mlp)\.down_proj\.weight", "shared_experts")
LINEAR_ATTN = WriterRow(r"linear_attn\.(out_proj|o_proj)\.weight", "linear_attn")
MAMBA = WriterRow(r"mamba\.out_proj\.weight", "mixer")
FEED_FORWARD = WriterRow(r"feed_forward\.down_proj\.weight", "mlp")
NEOX_MLP = WriterRow(r"mlp\.dense_4h_to_h\.weight", "mlp")
GRANITE_EXPERTS = WriterRow(r"block_sparse_moe\.experts\.down_proj", "experts", hidden_axis=1)
GRANITE_SHARED = WriterRow(r"shared_mlp\.output_linear\.weight", "shared_experts")

PRE_NORM = (ATTN, MLP, EXPERTS, SHARED)
OUT_FC2 = (WriterRow(r"self_attn\.out_proj\.weight", "attn"), WriterRow(r"fc2\.weight", "mlp"))


def _normed(
    attn: str, mlp: str, *more: WriterRow, outer: str | None = None
) -> tuple[WriterRow, ...]:
    """Return rows of attention and MLP with a norm after each, and `more` rows."""
    return (
        WriterRow(ATTN.pattern, "attn", post_norm=attn),
        WriterRow(MLP.pattern, "mlp", post_norm=mlp, outer_norm=outer),
        *more,
    )


FAMILIES: tuple[Family, ...] = (
    Family(
        _types(
            "apertus arcee bitnet cohere cohere2 cohere2_moe cwm deepseek_v2 deepseek_v3 "
            "deepseek_v32 diffllama dots1 ernie4_5 ernie4_5_moe exaone_moe gemma glm glm4_moe "
            "glm4_moe_lite granite granite_swa helium hunyuan_v1_dense hunyuan_v1_moe internlm3 "
            "iquestcoder jais2 laguna llama mellum mimo_v2_flash minicpm3 minimax_m2 ministral "
            "ministral3 mistral mixtral nemotron olmo olmoe phi3 phimoe qwen2 qwen2_5_vl_text "
            "qwen2_moe qwen2_vl_text qwen3 qwen3_moe qwen3_vl_text qwen3_vl_moe_text seed_oss "
            "smollm3 solar_open stablelm vaultgemma youtu"
        ),
        PRE_NORM,
    ),
    Family(
        _types("gemma2 gemma3_text olmo2 olmo3 exaone4"),
        _normed("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    Family(
        _types("flex_olmo"),
        (
            WriterRow(ATTN.pattern, "attn", post_norm="post_attention_layernorm"),
            WriterRow(EXPERTS.pattern, "experts", 1, post_norm="post_feedforward_layernorm"),
        ),
    ),
    # The experts and the MLP next to them have a norm each, and one over their sum.
    Family(
        _types("gemma4_text"),
        _normed(
            "post_attention_layernorm",
            "post_feedforward_layernorm_1?",
            WriterRow(
                r"experts\.down_proj",
                "experts",
                hidden_axis=1,
                post_norm="post_feedforward_layernorm_2",
                outer_norm="post_feedforward_layernorm",
            ),
            WriterRow(
                r"per_layer_projection\.weight", "mlp", post_norm="post_per_layer_input_norm"
            ),
            outer="post_feedforward_layernorm",
        ),
    ),
    Family(_types("glm4 glm4v_text"), _normed("post_self_attn_layernorm", "post_mlp_layernorm")),
    Family(_types("hyperclovax"), _normed("post_norm1", "post_norm2")),
    Family(
        _types("afmoe"),
        _normed(
            "post_attention_layernorm",
            "post_mlp_layernorm",
            WriterRow(EXPERTS.pattern, "experts", hidden_axis=1, post_norm="post_mlp_layernorm"),
            WriterRow(SHARED.pattern, "shared_experts", post_norm="post_mlp_layernorm"),
        ),
    ),
    # Attention blocks norm what they write, linear ones what they read.
    Family(
        _types("olmo_hybrid"),
        _normed("post_attention_layernorm", "post_feedforward_layernorm?", LINEAR_ATTN),
    ),
    Family(
        _types("qwen3_next qwen3_5_text qwen3_5_moe_text"),
        (*PRE_NORM, LINEAR_ATTN),
    ),
    Family(
        _types("gpt_oss"),
        (ATTN, WriterRow(r"mlp\.experts\.down_proj", "experts", hidden_axis=2)),
    ),
    Family(
        _types("aria_text"),
        (ATTN, SHARED, WriterRow(r"mlp\.experts\.down_proj", "experts", hidden_axis=2)),
    ),
    Family(
        _types("llama4_text"),
        (
            ATTN,
            FEED_FORWARD,
            WriterRow(r"feed_forward\.experts\.down_proj", "experts", hidden_axis=2),
            WriterRow(r"feed_forward\.shared_expert\.down_proj\.weight", "shared_experts"),
        ),
    ),
    Family(_types("granitemoe granitemoe_swa"), (ATTN, GRANITE_EXPERTS)),
    Family(_types("granitemoeshared"), (ATTN, GRANITE_EXPERTS, GRANITE_SHARED)),
    Family(_types("granitemoehybrid"), (ATTN, GRANITE_EXPERTS, GRANITE_SHARED, MAMBA)),
    Family(
        _types("jetmoe"),
        (
            WriterRow(
                r"self_attention\.experts\.output_linear\.weight",
                "attn",
                hidden_axis=1,
                bias="self_attention.experts.bias",
            ),
            WriterRow(r"mlp\.output_linear\.weight", "experts", hidden_axis=1, bias="mlp.bias"),
        ),
    ),
    # What a hybrid adds to attention.
    Family(_types("falcon_h1 bamba"), (ATTN, MAMBA, FEED_FORWARD)),
    Family(
        _types("jamba"),
        (
            ATTN,
            MAMBA,
            FEED_FORWARD,
            WriterRow(r"feed_forward\.experts\.down_proj", "experts", hidden_axis=1),
        ),
    ),
    # The shared transformer block is read by the Mamba mixer; it does not write to the stream.
    Family(
        _types("zamba zamba2"),
        (WriterRow(r"(mamba_decoder\.)?mamba\.out_proj\.weight", "mixer"),),
    ),
    Family(_types("mamba mamba2 falcon_mamba"), (WriterRow(r"mixer\.out_proj\.weight", "mixer"),)),
    Family(
        _types("nemotron_h"),
        (
            WriterRow(r"mixer\.o_proj\.weight", "attn"),
            WriterRow(r"mixer\.down_proj\.weight", "mlp"),
            WriterRow(r"mixer\.experts\.down_proj", "experts", hidden_axis=1),
            WriterRow(r"mixer\.shared_experts\.down_proj\.weight", "shared_experts"),
            WriterRow(r"mixer\.out_proj\.weight", "mixer"),
        ),
    ),
    Family(
        _types("recurrent_gemma"),
        (
            WriterRow(r"temporal_block\.o_proj\.weight", "attn"),
            WriterRow(r"temporal_block\.linear_out\.weight", "linear_attn"),
            WriterRow(r"mlp_block\.down_proj\.weight", "mlp"),
        ),
    ),
    Family(
        _types("lfm2 lfm2_moe"),
        (
            WriterRow(r"self_attn\.out_proj\.weight", "attn"),
            WriterRow(r"conv\.out_proj\.weight", "mixer"),
            WriterRow(r"feed_forward\.w2\.weight", "mlp"),
            WriterRow(r"feed_forward\.experts\.down_proj", "experts", hidden_axis=1),
        ),
    ),
    Family(
        _types("xlstm"),
        (
            WriterRow(r"mlstm_layer\.out_proj\.weight", "linear_attn"),
            WriterRow(r"ffn\.proj_down\.weight", "mlp"),
        ),
    ),
    # Older decoders; GPT-2 stores its weights as Conv1D (in, out).
    Family(
        _types("gpt2"),
        (
            WriterRow(r"attn\.c_proj\.weight", "attn", hidden_axis=1),
            WriterRow(r"mlp\.c_proj\.weight", "mlp", hidden_axis=1),
        ),
    ),
    Family(
        _types("gpt_bigcode"),
        (
            WriterRow(r"attn\.c_proj\.weight", "attn"),
            WriterRow(r"mlp\.c_proj\.weight", "mlp"),
        ),
    ),
    Family(_types("starcoder2"), (ATTN, WriterRow(r"mlp\.c_proj\.weight", "mlp"))),
    Family(_types("nanochat"), (ATTN, WriterRow(r"mlp\.fc2\.weight", "mlp"))),
    Family(
        _types("gpt_neo"),
        (
            WriterRow(r"attn\.attention\.out_proj\.weight", "attn"),
            WriterRow(r"mlp\.c_proj\.weight", "mlp"),
        ),
    ),
    Family(
        _types("gptj codegen"),
        (WriterRow(r"attn\.out_proj\.weight", "attn"), WriterRow(r"mlp\.fc_out\.weight", "mlp")),
    ),
    Family(
        _types("gpt_neox gpt_neox_japanese"),
        (WriterRow(r"attention\.dense\.weight", "attn"), NEOX_MLP),
    ),
    Family(_types("falcon bloom"), (WriterRow(r"self_attention\.dense\.weight", "attn"), NEOX_MLP)),
    Family(_types("persimmon"), (WriterRow(r"self_attn\.dense\.weight", "attn"), NEOX_MLP)),
    Family(
        _types("phi"),
        (WriterRow(r"self_attn\.dense\.weight", "attn"), WriterRow(r"mlp\.fc2\.weight", "mlp")),
    ),
    Family(_types("opt xglm biogpt"), OUT_FC2),
    Family(
        _types("mpt"),
        (
            WriterRow(r"attn\.out_proj\.weight", "attn"),
            WriterRow(r"ffn\.down_proj\.weight", "mlp"),
        ),
    ),
)

UNSUPPORTED: tuple[Unsupported, ...] = (
    Unsupported("minimax", "its stream passes through the norm of every block"),
    Unsupported("openai-gpt", "its stream passes through the norms of every block"),
    Unsupported("doge", "its stream is multiplied by a learned vector in every block"),
    Unsupported("gemma3n_text", "its blocks add their normed input to the stream (LAuReL)"),
    Unsupported("longcat_flash", "its zero experts add their normed input to the stream"),
    Unsupported("rwkv", "a gate multiplies what its MLP writes, feature by feature"),
    Unsupported(
        "opt",
        "its stream passes through the norms of every block",
        setting="do_layer_norm_before",
        value=False,
    ),
    Unsupported(
        "bloom",
        "its blocks add their normed input to the stream",
        setting="apply_residual_connection_post_layernorm",
        value=True,
    ),
)


def families_markdown() -> str:
    """Return the table of families of `docs/architectures.md`."""
    lines = ["| model types | writers (pattern, component, hidden axis) |", "|---|---|"]
    for family in FAMILIES:
        types = ", ".join(f"`{name}`" for name in sorted(family.model_types))
        lines.append(f"| {types} | {'<br>'.join(_row_markdown(row) for row in family.rows)} |")
    return "\n".join(lines)


def unsupported_markdown() -> str:
    """Return the table of unsupported model types of `docs/architectures.md`."""
    lines = ["| model type | why |", "|---|---|"]
    for entry in UNSUPPORTED:
        only = f" with `{entry.setting} = {entry.value}`" if entry.setting else ""
        lines.append(f"| `{entry.model_type}`{only} | {entry.reason} |")
    return "\n".join(lines)


def _row_markdown(row: WriterRow) -> str:
    pattern = row.pattern.replace("|", "\\|")
    norms = [f"`{name}`" for name in (row.post_norm, row.outer_norm) if name]
    after = f", then {', '.join(norms)}" if norms else ""
    return f"`{pattern}` {row.component} {row.hidden_axis}{after}"
