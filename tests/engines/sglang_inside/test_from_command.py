"""What verify takes over from a command that serves, as SGLang's own parser reads it."""

import pytest

from norm_plugin.verify.sglang_child import from_command


@pytest.mark.parametrize("model", [["some/model"], ["--model-path", "some/model"], ["--model", "some/model"]])
def test_the_model_may_have_an_option_or_none(model):
    words = [*model, "--port", "1", "--attention-backend", "torch_native", "--model-type", "llm"]
    assert from_command(words) == {"attention_backend": "torch_native"}


def test_a_word_that_sglang_does_not_know(capsys):
    with pytest.raises(SystemExit):
        from_command(["some/model", "--atention-backend", "torch_native"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "sglang serve: error: unrecognized arguments: --atention-backend torch_native"
