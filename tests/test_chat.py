"""`make chat` answers, keeps the conversation, and says what is wrong in one line."""

from pathlib import Path

import pytest
from small_models import make_tokenizer, random_model

from ground.errors import UserError
from launch.tools import chat as module
from launch.tools.chat import chat


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = make_tokenizer(short_system=True)
    model = random_model(tokenizer, seed=0, window=600)
    model.generation_config.eos_token_id = list(range(len(tokenizer)))  # answers of one token
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_each_line_is_answered_with_the_whole_conversation_before_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, seen = iter(["Hi", "And you?", ""]), []
    answer = module._answer

    def spy(model: object, tokenizer: object, messages: list[dict[str, str]], think: bool) -> str:
        seen.append([m["role"] for m in messages])
        return answer(model, tokenizer, messages, think)

    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr(module, "_answer", spy)
    chat(folder, "no_think")
    assert seen == [["user"], ["user", "assistant", "user"]]
    assert f"{folder}, /no_think" in capsys.readouterr().out


def test_what_cannot_be_talked_to_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match="MODE=loud: use think or no_think"):
        chat(folder, "loud")
    with pytest.raises(UserError, match=r"nowhere: no config\.json there; .*`make release`"):
        chat(folder / "nowhere", "think")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template, a base model"):
        chat(folder, "think")
