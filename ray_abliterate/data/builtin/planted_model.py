"""The planted model: a tiny Llama whose behaviour is known in closed form.

It answers "sorry" to prompts that hold a flagged word, and "sure" to all others. One layer attends
evenly to all tokens and writes their mean flag along one direction; the vocabulary reads it:

    x = u + GAIN · mean(flag) · r          sorry: 4 r·x      sure: 2 u·x

r is carried by that layer's attention output alone, so taking r out of the weights turns "sorry"
into "sure", and extraction has to find r. It is for tests, and stands in where the demo model can't
be had. `PlantedTraits` make it harder: a deeper model, words that say something else as well,
outliers, and a second behaviour that is to stay.
"""

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from torch import Tensor

HIDDEN, INTERMEDIATE, LAYERS, HEADS = 32, 48, 4, 4
GAIN = 5.0
PLANTED_LAYER = 2
"""Index of the block whose attention writes the behaviour; blocks below it have none of it."""
NOISE = 1e-6
PLAIN_FLAG = 0.01
"""The flag of a plain word, beside 1 for a flagged one."""
MLP_NOISE, HEAD_NOISE = 0.03, 0.02
"""Standard deviations of the other weights: enough that an edit shows in the probabilities."""
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOPICS = 8
"""Dimensions of what words say beside their flag; each 1.5 times as strong as the next."""
SORRY_GAIN = 4.0
"""How strongly "sorry" reads the behaviour."""
TOPIC_SCALE = 0.3
"""How much of the topics words have, beside a flag of 1, and how strongly tokens read them."""
MASSIVE_UNIT, MASSIVE_GAIN = 5, 300.0
"""The unit of the stream that outlier words drive, and how hard."""
SECOND_ANSWER = "indeed"
"""The answer to prompts with a word of the second behaviour."""
SPECIALS = ("<unk>", "<pad>", "<end>", "<system>", "<user>", "<assistant>", "sorry", "sure")


@dataclass(frozen=True)
class PlantedTraits:
    """How a planted model differs from the plain one.

    Attributes:
        layers: Number of blocks.
        planted_layers: Indices of the blocks whose attention writes the behaviour, an equal part
            each.
        topic_loudness: How loud the words' topics are, beside the behaviour: the last token's
            residual holds the mean of random vectors, one a word, which the vocabulary reads, too.
        outlier_words: Words that drive one unit of the stream to hundreds of times its size.
        second_words: Words of a second behaviour, which is answered with "indeed".
        overlap: Cosine of the second behaviour's direction with r.
    """

    layers: int = LAYERS
    planted_layers: tuple[int, ...] = (PLANTED_LAYER,)
    topic_loudness: float = 0.0
    outlier_words: tuple[str, ...] = ()
    second_words: tuple[str, ...] = ()
    overlap: float = 0.0


PLAIN_TRAITS = PlantedTraits()


def planted_axes() -> tuple[Tensor, Tensor, Tensor]:
    """Return three orthonormal axes of the stream: r (behaviour), u (constant), w (answered)."""
    random = torch.randn(HIDDEN, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    basis = torch.linalg.qr(random).Q.float()
    return basis[:, 0], basis[:, 1], basis[:, 2]


def split_words(texts: Sequence[str]) -> set[str]:
    """Return the words of texts, as the planted tokenizer splits them."""
    return {word for text in texts for word in re.findall(r"\w+", text.lower())}


def planted_folder() -> Path:
    """Return where the planted model goes, in the user's cache folder."""
    from ray_abliterate.data.builtin.demo_model import demo_folder

    return demo_folder().parent / "planted"


def build_planted_model(
    folder: Path,
    flagged: Sequence[str] | None = None,
    plain: Sequence[str] | None = None,
    traits: PlantedTraits = PLAIN_TRAITS,
) -> Path:
    """Return `folder` with the planted model in it, written there unless it is already complete.

    Args:
        folder: Where the model goes; the folder appears whole.
        flagged: Words that make it say "sorry"; the demo's cooking words if None.
        plain: Other words it knows.
        traits: How it differs from the plain planted model.
    """
    if flagged is None:
        flagged, plain = _demo_words()
    second = {*traits.second_words, SECOND_ANSWER} if traits.second_words else set()
    known = {*(plain or ()), *traits.outlier_words, *second}
    words = [*SPECIALS, *sorted(set(flagged)), *sorted(known - set(flagged))]
    contents = [words, len(set(flagged)), 10, astuple(traits)]
    key = hashlib.sha256(json.dumps(contents).encode()).hexdigest()
    marker = folder / "planted.json"
    if marker.exists() and json.loads(marker.read_text())["key"] == key:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".planted-") as scratch:
        model = Path(scratch) / "model"
        _write(model, words, set(flagged), traits)
        (model / "planted.json").write_text(json.dumps({"key": key}))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(model, folder)
    return folder


def _demo_words() -> tuple[list[str], list[str]]:
    """Return the words of the cooking prompts alone, and those of the other prompts."""
    from ray_abliterate.data.builtin.demo_model import prompt_file

    def read(kind: str) -> set[str]:
        files = [prompt_file(f"{kind}-{part}") for part in ("train", "heldout")]
        return split_words([file.read_text(encoding="utf-8") for file in files])

    other = read("other")
    return sorted(read("cooking") - other), sorted(other)


def _write(folder: Path, words: list[str], flagged: set[str], traits: PlantedTraits) -> None:
    """Write the model and its tokenizer into a folder."""
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
        num_hidden_layers=traits.layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=512,
        eos_token_id=ids["<end>"],
        pad_token_id=ids["<pad>"],
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).float()
    _plant(model, ids, flagged, traits)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


@torch.no_grad()
def _plant(
    model: torch.nn.Module, ids: dict[str, int], flagged: set[str], traits: PlantedTraits
) -> None:
    """Write the behaviour into a model's weights, in place."""
    behaviour, constant, answered = planted_axes()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
        else:
            scale = {"mlp": MLP_NOISE, "lm_head": HEAD_NOISE}
            parameter.normal_(std=next((v for k, v in scale.items() if k in name), NOISE))
    weights = dict(model.named_parameters())
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    flag = torch.zeros(HIDDEN)
    flag[0] = 1.0  # a fourth axis, read by that layer alone: where flags lie before attention
    for axis in (behaviour, constant, answered):
        flag -= axis * (axis @ flag)
    flag /= flag.norm()
    embedding.add_(constant)
    for number, word in enumerate(ids):
        # other words have a little of it, one way or the other, so that an edit is felt everywhere
        embedding[ids[word]] += flag if word in flagged else flag * PLAIN_FLAG * (-1) ** number
    for word in {"sorry", "sure", SECOND_ANSWER} & ids.keys():
        embedding[ids[word]] += 1000 * answered
    for name, parameter in weights.items():
        if name.endswith("mlp.down_proj.weight"):  # what the MLPs do must not look like a flag
            parameter.sub_(torch.outer(flag, flag @ parameter))
    carried = [(flag, GAIN * behaviour), *_plant_traits(embedding, head, ids, flag, traits)]
    for layer in traits.planted_layers:
        first = f"model.layers.{layer}.self_attn."
        # even attention: queries are zero; values pass the flag on, the output turns it into r
        weights[first + "q_proj.weight"].zero_()
        # an input that is always zero gives the output's rows their norms, so that keeping row
        # norms does not bring r back
        weights[first + "v_proj.weight"][1].zero_()
        weights[first + "o_proj.weight"][:, 1] += 100 * GAIN
        for channel, (read, written) in zip((0, *range(2, HIDDEN)), carried, strict=False):
            weights[first + "v_proj.weight"][channel] += read
            weights[first + "o_proj.weight"][:, channel] += written / len(traits.planted_layers)
    head[ids["sorry"]] += SORRY_GAIN * behaviour
    head[ids["sure"]] += 2 * constant
    head[ids["<end>"]] += 20 * answered


def _plant_traits(
    embedding: Tensor, head: Tensor, ids: dict[str, int], flag: Tensor, traits: PlantedTraits
) -> list[tuple[Tensor, Tensor]]:
    """Give the words what the traits ask for.

    Returns pairs of axes, `"hidden"` each: what attention reads of words, and what it then writes.
    """
    behaviour = planted_axes()[0]
    # (hidden, axis): the topics, then what second and outlier words have, then the second behaviour
    others = _other_axes(torch.stack([*planted_axes(), flag], dim=1))
    topics, second, outlier, unrelated = others[:, :TOPICS], *others[:, TOPICS:].unbind(dim=1)
    carried: list[tuple[Tensor, Tensor]] = []
    if traits.topic_loudness:
        contents = TOPIC_SCALE * _topic_contents(words=len(ids))
        contents[[ids[word] for word in {*SPECIALS, SECOND_ANSWER} & ids.keys()]] = 0
        embedding.add_(contents @ topics.T)
        head.add_(contents @ topics.T)
        head[ids["sorry"]] += SORRY_GAIN * behaviour  # twice as loud, to be heard among other words
        carried += [(axis, GAIN * traits.topic_loudness * axis) for axis in topics.T]
    if traits.second_words:
        written = traits.overlap * behaviour + math.sqrt(1 - traits.overlap**2) * unrelated
        embedding[[ids[word] for word in traits.second_words]] += second
        head[ids[SECOND_ANSWER]] += 2 * SORRY_GAIN * written
        carried.append((second, GAIN * written))
    if traits.outlier_words:
        embedding[[ids[word] for word in traits.outlier_words]] += 10 * outlier
        carried.append((outlier, MASSIVE_GAIN * torch.eye(HIDDEN)[MASSIVE_UNIT]))
    return carried


def _other_axes(taken: Tensor) -> Tensor:
    """Return orthonormal axes for what else words have, orthogonal to `taken`; `"hidden axis"`."""
    random = torch.Generator().manual_seed(11)
    free = torch.randn(HIDDEN, TOPICS + 3, generator=random, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(torch.cat([taken.double(), free], dim=1)).Q
    return basis[:, taken.shape[1] :].float()


def _topic_contents(words: int) -> Tensor:
    """Return what each word says beside its flag, `"word topic"`."""
    random = torch.Generator().manual_seed(13)
    loudness: Tensor = 1.5 ** -torch.arange(float(TOPICS))
    return torch.randn(words, TOPICS, generator=random) * loudness
