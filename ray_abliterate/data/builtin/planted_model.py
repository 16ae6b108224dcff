"""The planted model: a tiny Llama whose behaviour is known in closed form.

It answers "sorry" to prompts that hold a flagged word, and "sure" to all others. One layer attends
evenly to all tokens and writes their mean flag along one direction; the vocabulary reads it:

    x = u + GAIN · mean(flag) · r          sorry: 4 r·x      sure: 2 u·x

r is carried by that layer's attention output alone, so taking r out of the weights turns "sorry"
into "sure", and extraction has to find r. For tests, and where the real demo model can't be had.
`Traits` make it harder: a deeper model, words that say something else as well, outliers, and a
second behaviour that is to stay.
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
TOPICS = 8
"""Dimensions of what words say beside their flag; each half as strong again as the next."""
READ = 4.0
"""How strongly "sorry" reads the behaviour."""
SAID = 0.3
"""How much of it words have, beside a flag of 1, and how strongly tokens read it."""
MASSIVE_UNIT, MASSIVE = 5, 300.0
"""The unit that outlying words drive, and how hard."""
INDEED = "indeed"
"""How prompts with a word of the second behaviour are answered."""
SPECIALS = ("<unk>", "<pad>", "<end>", "<system>", "<user>", "<assistant>", "sorry", "sure")


@dataclass(frozen=True)
class Traits:
    """How a planted model differs from the plain one.

    Attributes:
        layers: Blocks of the model.
        planted: The blocks whose attention writes the behaviour, an equal part each.
        topics: How loud what else words say is, beside the behaviour: the last token's residual
            holds the mean of random vectors, one a word, which the vocabulary reads, too.
        outlying: Words that drive one unit of the stream to hundreds of times its size.
        kept: Words of a second behaviour, which is answered with "indeed".
        overlap: Cosine of its direction with r.
    """

    layers: int = LAYERS
    planted: tuple[int, ...] = (PLANTED_LAYER,)
    topics: float = 0.0
    outlying: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    overlap: float = 0.0


PLAIN_TRAITS = Traits()


def planted_axes() -> tuple[Tensor, Tensor, Tensor]:
    """The three orthonormal axes of the stream: r (behaviour), u (always there), w (answered)."""
    random = torch.randn(HIDDEN, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    basis = torch.linalg.qr(random).Q.float()
    return basis[:, 0], basis[:, 1], basis[:, 2]


def words_of(texts: Sequence[str]) -> set[str]:
    """The words of some texts, as the planted tokenizer splits them."""
    return {word for text in texts for word in re.findall(r"\w+", text.lower())}


def planted_folder() -> Path:
    """Where the planted model is kept, beside the demo model."""
    from ray_abliterate.data.builtin import demo_model as demo

    return demo.demo_folder().parent / "planted"


def build_planted_model(
    folder: Path,
    flagged: Sequence[str] | None = None,
    plain: Sequence[str] | None = None,
    traits: Traits = PLAIN_TRAITS,
) -> Path:
    """Write the model folder, whole; one that is there already is returned as it is.

    Args:
        folder: Where to.
        flagged: Words that make it say "sorry"; the demo's cooking words if not given.
        plain: Other words it knows.
        traits: How it differs from the plain planted model.
    """
    if flagged is None:
        flagged, plain = _demo_words()
    known = {*(plain or ()), *traits.outlying, *traits.kept, *((INDEED,) if traits.kept else ())}
    words = [*SPECIALS, *sorted(set(flagged)), *sorted(known - set(flagged))]
    facts = [words, len(set(flagged)), 10, astuple(traits)]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    marker = folder / "planted.json"
    if marker.exists() and json.loads(marker.read_text())["key"] == key:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".planted-") as scratch:
        made = Path(scratch) / "model"
        _write(made, words, set(flagged), traits)
        (made / "planted.json").write_text(json.dumps({"key": key}))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(made, folder)
    return folder


def _demo_words() -> tuple[list[str], list[str]]:
    from ray_abliterate.data.builtin import demo_model as demo

    def read(kind: str) -> set[str]:
        files = [demo.prompt_file(f"{kind}-{part}") for part in ("train", "heldout")]
        return words_of([file.read_text(encoding="utf-8") for file in files])

    other = read("other")
    return sorted(read("cooking") - other), sorted(other)


def _write(folder: Path, words: list[str], flagged: set[str], traits: Traits) -> None:
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
def _plant(model: torch.nn.Module, ids: dict[str, int], flagged: set[str], traits: Traits) -> None:
    behaviour, always, answered = planted_axes()
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
    for axis in (behaviour, always, answered):
        flag -= axis * (axis @ flag)
    flag /= flag.norm()
    embedding.add_(always)
    for number, word in enumerate(ids):
        # other words have a little of it, one way or the other, so that an edit is felt everywhere
        embedding[ids[word]] += flag if word in flagged else flag * FAINT * (-1) ** number
    for word in {"sorry", "sure", INDEED} & ids.keys():
        embedding[ids[word]] += 1000 * answered
    for name, parameter in weights.items():
        if name.endswith("mlp.down_proj.weight"):  # what the MLPs do must not look like a flag
            parameter.sub_(torch.outer(flag, flag @ parameter))
    carried = [(flag, GAIN * behaviour), *_further(embedding, head, ids, flag, traits)]
    for layer in traits.planted:
        first = f"model.layers.{layer}.self_attn."
        # even attention: queries are zero; values pass the flag on, the output turns it into r
        weights[first + "q_proj.weight"].zero_()
        # an input that is always zero gives the output's rows their norms, so that keeping row
        # norms does not bring r back
        weights[first + "v_proj.weight"][1].zero_()
        weights[first + "o_proj.weight"][:, 1] += 100 * GAIN
        for channel, (read, written) in zip((0, *range(2, HIDDEN)), carried, strict=False):
            weights[first + "v_proj.weight"][channel] += read
            weights[first + "o_proj.weight"][:, channel] += written / len(traits.planted)
    head[ids["sorry"]] += READ * behaviour
    head[ids["sure"]] += 2 * always
    head[ids["<end>"]] += 20 * answered


def _further(
    embedding: Tensor, head: Tensor, ids: dict[str, int], flag: Tensor, traits: Traits
) -> list[tuple[Tensor, Tensor]]:
    """Give words what traits say; what attention is to read of them, and to write for it."""
    behaviour = planted_axes()[0]
    others = _other_axes(torch.stack([*planted_axes(), flag], dim=1))
    topics, second, away, kept = others[:, :TOPICS], *others[:, TOPICS:].unbind(dim=1)
    carried: list[tuple[Tensor, Tensor]] = []
    if traits.topics:
        said = SAID * _said(words=len(ids))
        said[[ids[word] for word in {*SPECIALS, INDEED} & ids.keys()]] = 0
        embedding.add_(said @ topics.T)
        head.add_(said @ topics.T)
        head[ids["sorry"]] += READ * behaviour  # twice as loud, to be heard among other words
        carried += [(axis, GAIN * traits.topics * axis) for axis in topics.T]
    if traits.kept:
        kept = traits.overlap * behaviour + math.sqrt(1 - traits.overlap**2) * kept
        embedding[[ids[word] for word in traits.kept]] += second
        head[ids[INDEED]] += 2 * READ * kept
        carried.append((second, GAIN * kept))
    if traits.outlying:
        embedding[[ids[word] for word in traits.outlying]] += 10 * away
        carried.append((away, MASSIVE * torch.eye(HIDDEN)[MASSIVE_UNIT]))
    return carried


def _other_axes(taken: Tensor) -> Tensor:
    """Orthonormal axes for what else words have, orthogonal to those that are taken."""
    random = torch.Generator().manual_seed(11)
    more = torch.randn(HIDDEN, TOPICS + 3, generator=random, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(torch.cat([taken.double(), more], dim=1)).Q
    return basis[:, taken.shape[1] :].float()


def _said(words: int) -> Tensor:
    """What each word says beside its flag, `"word topic"`."""
    random = torch.Generator().manual_seed(13)
    loudness: Tensor = 1.5 ** -torch.arange(float(TOPICS))
    return torch.randn(words, TOPICS, generator=random) * loudness
