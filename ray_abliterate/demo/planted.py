"""The planted model: a tiny Llama whose behaviour is known in closed form.

It answers "sorry" to prompts that hold a flagged word, and "sure" to all others. One layer attends
evenly to all tokens and writes their mean flag along one direction; the vocabulary reads it:

    x = u + GAIN · mean(flag) · r          sorry: 4 r·x      sure: 2 u·x

r is carried by that layer's attention output alone, so taking r out of the weights turns "sorry"
into "sure", and extraction has to find r. For tests, and where the real demo model can't be had.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

HIDDEN, INTERMEDIATE, LAYERS, HEADS = 32, 48, 4, 4
GAIN = 5.0
PLANTED_LAYER = 2
"""The block whose attention writes the behaviour; blocks below it know nothing of it."""
NOISE = 1e-6
FAINT = 0.01
"""How much of a flag a plain word has."""
MLP_NOISE, HEAD_NOISE = 0.03, 0.02
"""What the other weights do: enough that an edit shows in the probabilities, no more."""
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIALS = ("<unk>", "<pad>", "<end>", "<system>", "<user>", "<assistant>", "sorry", "sure")


def planted_axes() -> tuple[Tensor, Tensor, Tensor]:
    """The three orthonormal axes of the stream: r (behaviour), u (always there), w (answered)."""
    random = torch.randn(HIDDEN, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    basis = torch.linalg.qr(random).Q.float()
    return basis[:, 0], basis[:, 1], basis[:, 2]


def words_of(texts: Sequence[str]) -> set[str]:
    """The words of some texts, as the planted tokenizer splits them."""
    return {word for text in texts for word in re.findall(r"\w+", text.lower())}


def default_folder() -> Path:
    """Where the planted model is kept, beside the demo model."""
    from ray_abliterate import demo

    return demo.default_folder().parent / "planted"


def build_planted_model(
    folder: Path, flagged: Sequence[str] | None = None, plain: Sequence[str] | None = None
) -> Path:
    """Write the model folder, whole; one that is there already is returned as it is.

    Args:
        folder: Where to.
        flagged: Words that make it say "sorry"; the demo's cooking words if not given.
        plain: Other words it knows.
    """
    if flagged is None:
        flagged, plain = _demo_words()
    words = [*SPECIALS, *sorted(set(flagged)), *sorted(set(plain or ()) - set(flagged))]
    key = hashlib.sha256(json.dumps([words, len(set(flagged)), 9]).encode()).hexdigest()
    marker = folder / "planted.json"
    if marker.exists() and json.loads(marker.read_text())["key"] == key:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".planted-") as scratch:
        made = Path(scratch) / "model"
        _write(made, words, set(flagged))
        (made / "planted.json").write_text(json.dumps({"key": key}))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(made, folder)
    return folder


def _demo_words() -> tuple[list[str], list[str]]:
    from ray_abliterate import demo

    def read(kind: str) -> set[str]:
        files = [demo.prompt_file(f"{kind}-{part}") for part in ("train", "heldout")]
        return words_of([file.read_text(encoding="utf-8") for file in files])

    other = read("other")
    return sorted(read("cooking") - other), sorted(other)


def _write(folder: Path, words: list[str], flagged: set[str]) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    ids = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<end>",
        additional_special_tokens=["<system>", "<user>", "<assistant>"],
    )  # fmt: skip
    fast.chat_template = TEMPLATE
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=512,
        eos_token_id=ids["<end>"],
        pad_token_id=ids["<pad>"],
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).float()
    _plant(model, ids, flagged)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


@torch.no_grad()
def _plant(model: torch.nn.Module, ids: dict[str, int], flagged: set[str]) -> None:
    behaviour, always, answered = planted_axes()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
        else:
            scale = {"mlp": MLP_NOISE, "lm_head": HEAD_NOISE}
            parameter.normal_(std=next((v for k, v in scale.items() if k in name), NOISE))
    weights = dict(model.named_parameters())
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    first = f"model.layers.{PLANTED_LAYER}.self_attn."
    flag = torch.zeros(HIDDEN)
    flag[0] = 1.0  # a fourth axis, read by that layer alone: where flags lie before attention
    for axis in (behaviour, always, answered):
        flag -= axis * (axis @ flag)
    flag /= flag.norm()
    embedding.add_(always)
    for number, word in enumerate(ids):
        # other words have a little of it, one way or the other, so that an edit is felt everywhere
        embedding[ids[word]] += flag if word in flagged else flag * FAINT * (-1) ** number
    for word in ("sorry", "sure"):
        embedding[ids[word]] += 1000 * answered
    for name, parameter in weights.items():
        if name.endswith("mlp.down_proj.weight"):  # what the MLPs do must not look like a flag
            parameter.sub_(torch.outer(flag, flag @ parameter))
    # even attention: queries are zero; values pass the flag on, the output turns it into r
    weights[first + "q_proj.weight"].zero_()
    weights[first + "v_proj.weight"][0] += flag
    weights[first + "o_proj.weight"][:, 0] += GAIN * behaviour
    # an input that is always zero gives the output's rows their norms, so that keeping row norms
    # does not bring r back
    weights[first + "v_proj.weight"][1].zero_()
    weights[first + "o_proj.weight"][:, 1] += 100 * GAIN
    head[ids["sorry"]] += 4 * behaviour
    head[ids["sure"]] += 2 * always
    head[ids["<end>"]] += 20 * answered
