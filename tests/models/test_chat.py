"""How a checkpoint talks, whichever of its files say so."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from efficientllava.checkpoint.folder import load
from efficientllava.data.prompts import Prompts
from efficientllava.data.records import Turn
from efficientllava.deploy.inputs import chat_template
from efficientllava.models.chat import end_tokens, template_of


@pytest.mark.parametrize("of", ["processor", "tokenizer"])
@pytest.mark.parametrize("named", [False, True])
def test_a_template_of_either_and_the_default_of_several(of, named):
    said = {"default": "{{ 1 }}", "rag": "{{ 2 }}"} if named else "{{ 1 }}"
    both = {"processor": None, "tokenizer": None, of: said}
    tokenizer = SimpleNamespace(chat_template=both["tokenizer"])
    assert template_of(SimpleNamespace(tokenizer=tokenizer, chat_template=both["processor"])) == "{{ 1 }}"
    assert template_of(SimpleNamespace(tokenizer=SimpleNamespace())) == ""


def test_prompts_and_exported_files_have_the_same_template():
    processor = load("builtin:tiny_llava").processor
    template, plain = processor.chat_template, chat_template(processor)
    asked = Prompts(processor).render([Turn("what is red?", "")], 1, True)
    processor.chat_template = {"default": template, "rag": "{{ messages }}"}
    assert Prompts(processor).render([Turn("what is red?", "")], 1, True) == asked
    assert chat_template(processor) == plain
    processor.chat_template, processor.tokenizer.chat_template = None, template
    assert chat_template(processor) == plain != ""


def test_a_template_that_is_written_into_a_file_runs_no_code(tmp_path):
    processor, mark = load("builtin:tiny_llava").processor, tmp_path / "mark"
    evil = f"cycler.__init__.__globals__.os.system('touch {mark}')"
    processor.chat_template = f"{{{{ {evil} }}}}" + processor.chat_template
    with pytest.raises(Exception, match="unsafe"):
        chat_template(processor)
    assert not mark.exists()


def test_answers_end_where_the_model_says_or_else_its_tokenizer():
    tokenizer = SimpleNamespace(eos_token_id=3)
    for named, ends in ((None, [3]), (7, [7]), ([7, 8], [7, 8])):
        assert end_tokens(SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=named)), tokenizer) == ends
    nobody = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))
    assert end_tokens(nobody, SimpleNamespace(eos_token_id=None)) == []
