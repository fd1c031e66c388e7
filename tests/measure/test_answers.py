"""Agreement and loops, on models whose answers are known: a model that counts, and one that says one word."""

import json
import math
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import remove_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from models import EOS, MIXTURES, ROWS, SIMILAR, build, make_letters, make_tokenizer
from outputs import Notes, error_of
from secateur.checkpoints import tokens
from secateur.measure import answers, perplexity
from secateur.measure.answers import ANSWER_TOKENS, agreement, greedy_answers, loop_share, loops, packaged_prompts
from secateur.measure.evaluation import evaluate
from secateur.measure.generation import greedy_tokens, prompt_ids
from secateur.report.tables import measured_rows
from secateur.text.documents import render_or_join

VOCAB = 128
PROMPTS = [[7, 9, 4], [5], [20, 21, 22, 23, 24, 25, 26]]


def model_of_next_tokens(following: list[int], **more: Any) -> LlamaForCausalLM:
    """Return a model that follows each token by a certain one, whatever was before it."""
    sizes = {"vocab_size": VOCAB, "hidden_size": VOCAB, "intermediate_size": 8, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": EOS}
    model = LlamaForCausalLM(LlamaConfig(**(sizes | heads | {"max_position_embeddings": 2048} | more))).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(VOCAB))
        model.lm_head.weight.zero_()
        model.lm_head.weight[torch.tensor(following), torch.arange(VOCAB)] = 1.0
    return model


COUNTING = [(token + 1) % VOCAB for token in range(VOCAB)]
"""Each token is followed by the next id, up to EOS, which is 1."""
SAYING = [50] * VOCAB
"""Every token is followed by the same one."""


def saved(model: LlamaForCausalLM, folder: Path, tokenizer: Any = None) -> str:
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return str(folder)


def test_a_run_of_eight_tokens_that_occurs_twice_is_a_loop():
    run = list(range(8))
    assert loops([*run, 99, *run])
    assert not loops([*run, 99, *run[:7]])
    assert loops([5] * 9)
    assert not loops([5] * 8)
    assert not loops([])
    assert loop_share([[5] * 20, run]) == 0.5


def test_a_counting_model_never_loops_and_one_that_says_one_word_always_does():
    counted = greedy_answers(model_of_next_tokens(COUNTING), PROMPTS, [EOS])
    assert counted == [list(range(prompt[-1] + 1, prompt[-1] + 1 + ANSWER_TOKENS)) for prompt in PROMPTS]
    assert loop_share(counted) == 0
    assert len(packaged_prompts()) == len(set(packaged_prompts())) == 40
    said = greedy_answers(model_of_next_tokens(SAYING), PROMPTS, [EOS])
    assert said == [[50] * ANSWER_TOKENS] * 3
    assert loop_share(said) == 1


def test_an_answer_stops_before_an_end_token():
    model = model_of_next_tokens(COUNTING)
    assert greedy_answers(model, [[100], [5]], [EOS, 110])[0] == list(range(101, 110))
    assert greedy_answers(model, [[0]], [EOS]) == [[]]


def test_agreement_is_the_share_of_tokens_ranked_first():
    """A model that counts only behind odd ids agrees with every second token of a counting model."""
    dense = model_of_next_tokens(COUNTING)
    other = model_of_next_tokens([following if token % 2 else 50 for token, following in enumerate(COUNTING)])
    written = greedy_answers(dense, PROMPTS, [EOS])
    before = [token for prompt, answer in zip(PROMPTS, written, strict=True) for token in (prompt[-1], *answer[:-1])]
    wanted = sum(token % 2 or token == 49 for token in before) / len(before)
    assert 0.4 < wanted < 0.6
    assert agreement(other, PROMPTS, written) == wanted
    assert agreement(dense, PROMPTS, written) == 1
    assert agreement(other, PROMPTS, [[], [], []]) == 1


FAMILY_NAMES = [name for name in ROWS | SIMILAR | MIXTURES if " " not in name and name != "mistral4"]
"""One row of each family; that of Mistral 4 is only the language model of a multimodal one."""


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_every_family_answers_in_a_batch_as_alone(name, monkeypatch):
    """Padding on the left changes no answer, and the model ranks every token first that it wrote itself.

    Llama 4's test model is left out of long prompts: it attends within stretches of 7 tokens, which padding shifts.
    """
    model = build(name)
    prompts = PROMPTS if name != "llama4_text" else PROMPTS[:2]
    alone = [greedy_tokens(model, [prompt], ends=[EOS], new_tokens=20)[0] for prompt in prompts]
    assert greedy_tokens(model, prompts, ends=[EOS], new_tokens=20) == alone
    monkeypatch.setattr(sys.modules[perplexity.__module__], "_FORWARD_LOGITS", 2 * 104 * VOCAB)
    assert agreement(model, prompts, alone) == 1


def ending_with_eos() -> Any:
    """Return a tokenizer that puts EOS after every text."""
    tokenizer = make_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    return tokenizer


def test_texts_that_go_on_have_no_end_token():
    tokenizer = make_tokenizer()
    assert prompt_ids(ending_with_eos(), "w1 w2") == prompt_ids(tokenizer, "w1 w2")
    opened = make_tokenizer(bos=True)
    assert prompt_ids(opened, "w1 w2") == opened("w1 w2")["input_ids"]


def test_ids_that_the_model_lacks_are_an_error():
    network = model_of_next_tokens(COUNTING)
    message = error_of(greedy_tokens, network, [[5, VOCAB]], ends=[EOS], new_tokens=2)
    assert message.startswith(f"the rows hold ids outside the vocabulary of {VOCAB}; use the model's own tokenizer")


def test_generation_settings_of_the_checkpoint_are_not_used():
    """A penalty for repetition would hide loops, and sampling would not be greedy."""
    model = model_of_next_tokens(SAYING)
    settings = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=50.0, no_repeat_ngram_size=2)
    model.generation_config = settings
    assert greedy_tokens(model.train(), [[5]], ends=[EOS], new_tokens=10) == [[50] * 10]
    assert model.generation_config is settings
    assert model.training


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(value):
    model = model_of_next_tokens(COUNTING)
    model.lm_head.weight.data[3, 9] = value
    for call, given in ((greedy_answers, ([[4]], [EOS])), (agreement, ([[9]], [[9, 9]]))):
        assert "the model's logits are not finite: its weights are damaged" in error_of(call, model, *given)


def test_a_model_agrees_with_itself(tmp_path):
    folder = saved(model_of_next_tokens(COUNTING), tmp_path / "model")
    result = evaluate(folder, against=folder, texts=[], answers=True)
    first, second = (model.answers for model in result.models)
    assert (first.prompts, first.loops, first.agreement, second.agreement) == (40, 0.0, 1.0, None)
    assert first.tokens == second.tokens > 0
    figures = {figure.label: figure for figure in result.figures()}
    assert (figures["agreement"].values, figures["agreement"].ratio) == ([1.0, 1.0], 1.0)
    assert (figures["answers that loop"].values, figures["answers that loop"].ratio) == ([0.0, 0.0], None)
    assert json.loads(json.dumps(result.as_dict()))["models"][0]["answers"]["agreement"] == 1.0
    assert [row[0] for row in measured_rows(result)][-2:] == ["agreement", "answers that loop"]


def noted(*folders: str, **how: Any) -> tuple[Any, list[str]]:
    notes = Notes()
    result = evaluate(folders[0], against=folders[1], texts=[], answers=True, watcher=notes, **how)
    return result, notes.said


def test_a_model_that_cannot_answer_is_skipped_with_a_reason(tmp_path):
    whole = saved(model_of_next_tokens(COUNTING), tmp_path / "whole")
    short = saved(model_of_next_tokens(COUNTING, max_position_embeddings=100), tmp_path / "short")
    result, lines = noted(whole, short)
    assert [model.answers for model in result.models] == [None, None]
    unmeasured = "Agreement and loops are not measured"
    (line,) = lines
    assert line.startswith(f"{unmeasured}: short has 100 positions, but prompts and answers have")
    result, (_, line, _) = noted(whole, whole, memory="1B", device="cpu")
    assert [model.answers for model in result.models] == [None, None]
    assert line == f"{unmeasured}: whole does not fit into memory, and would be read from disk once for every token"
    remove_tokenizer(tmp_path / "short")
    assert noted(whole, short)[1] == [f"{unmeasured}: short has no tokenizer"]


def test_models_with_different_tokenizers_have_no_agreement(tmp_path):
    words = saved(model_of_next_tokens(COUNTING), tmp_path / "words")
    letters = saved(model_of_next_tokens(SAYING), tmp_path / "letters", make_letters())
    result, lines = noted(words, letters)
    assert lines == ["Agreement is not measured: the two models' tokenizers differ"]
    assert [model.answers.loops for model in result.models] == [0.0, 1.0]
    assert "agreement" not in {figure.label for figure in result.figures()}


def test_a_chat_template_is_used():
    template = "{{ messages[0].content }} w5"
    plain = answers.question_ids(make_tokenizer(), "w1 w2")
    assert plain == make_tokenizer()("Question: w1 w2\nAnswer:")["input_ids"]
    assert answers.question_ids(make_tokenizer(template=template), "w1 w2") == [5, 6, 9]
    bad = make_tokenizer(template="{{ raise_exception('no') }}")
    assert "the chat template refuses these messages: no" in error_of(answers.question_ids, bad, "w1")


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * messages | length * 2 ** 36 }}",
        "{{ 'a' * 10 ** 7 }}",
    ],
)
def test_a_chat_template_has_bounds(template, monkeypatch):
    monkeypatch.setattr(tokens, "TEMPLATE_SECONDS", 0.5)
    tokenizer, messages = make_tokenizer(template=template), [{"role": "user", "content": "w1"}]
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
    for render in (lambda: answers.question_ids(tokenizer, "w1"), lambda: render_or_join(messages, tokenizer)):
        assert "the chat template takes too long or writes too much; correct it, or rem" in error_of(render)
    assert before == (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM))


def test_eval_prints_agreement_and_loops_with_against(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(model_of_next_tokens(SAYING), tmp_path / "said")
    saved(model_of_next_tokens(COUNTING), tmp_path / "counted")
    result = run("eval", "said", "--against", "counted")
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in result.out.splitlines() if "│" in line}
    assert [cell.strip() for cell in rows["answers that loop"]] == ["100.0%", "0.0%", ""]
    assert [cell.strip() for cell in rows["agreement"]][1] == "100.0%"
    assert "Answers: 40 prompts, up to 96 tokens each" in result.out
    for quiet in (("eval", "said", "--against", "counted", "--no-answers"), ("eval", "said")):
        assert "loop" not in run(*quiet).out
    alone = run("eval", "said", "--answers").out
    assert "answers that loop" in alone
    assert "greement" not in alone
