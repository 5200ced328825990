"""Prompts, targets and greedy answers, against one query at a time without padding or cache."""

from __future__ import annotations

import contextlib
import functools
import math

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from meg_kernels.editing.prompting import (
    IGNORED,
    PromptedModel,
    PromptTemplate,
    TargetBatch,
    answer_text,
    answers_match,
    score_targets,
    stop_tokens,
    target_tokens,
)
from meg_kernels.facts import Fact, FactsError
from meg_kernels.pretrained import load_language_model, smollm2_folder

VOCABULARY = 67  # of the tiny models
PAD, BOS, EOS, LINE, BLANK_LINE, STOP = range(6)
SPECIAL = ["<pad>", "<s>", "</s>", "\n", "\n\n", "."]
# Logits of size 1 to 10 come through three layers of sums over at most 48 products: a few hundred
# roundings of float32.
TOLERANCE = {"rtol": 300 * torch.finfo(torch.float32).eps, "atol": 3e-5}


def finished(tokenizer: Tokenizer, **options) -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        **options,
    )


@pytest.fixture
def tokenizer():
    """Words, full stops and line breaks, after a token that begins the text."""
    words = [*SPECIAL, "Q:", "A:", *(f"w{i}" for i in range(VOCABULARY - 8))]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "w0"))
    plain.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Split(Regex(r"\n+|\."), "isolated"),
        ]
    )
    plain.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return finished(plain)


@pytest.fixture
def merging_tokenizer():
    """One that joins a prompt's colon with the space behind it, and begins a text with a token."""
    words = [*SPECIAL, "A", ":", " ", "x", ": ", " x"]
    plain = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [(":", " "), (" ", "x")])
    )
    plain.decoder = decoders.Fuse()
    plain.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return finished(plain)


@functools.cache
def smollm2():
    return load_language_model("smollm2")


@pytest.fixture
def smollm2_tokenizer():
    try:
        smollm2_folder()
    except (FileNotFoundError, ImportError) as error:
        pytest.skip(f"SmolLM2 is not here: {error}")
    return smollm2()[1]


def random_pairs(count: int = 7, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(seed)

    def tokens(least: int, most: int) -> list[int]:
        length = int(torch.randint(least, most + 1, (), generator=generator))
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    return [(tokens(2, 9), tokens(1, 5)) for _ in range(count)]


def plain_scores(model, prompt, target):
    """Mean loss and hits from the full logits of one unpadded row, in float64."""
    logits = model(torch.tensor([prompt + target]), use_cache=False).logits[0].double()
    log_p = logits.log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(target) - 1)
    losses = [-log_p[place, token] for place, token in zip(places, target, strict=True)]
    hits = [
        int(logits[place].argmax()) == token for place, token in zip(places, target, strict=True)
    ]
    return sum(losses) / len(losses), hits


# Templates


def test_a_template_puts_the_query_in_its_place_once():
    assert PromptTemplate("<{}>").format("  What is {} in Python?\n") == "<What is {} in Python?>"


@pytest.mark.parametrize("text", ["Q: A:", "{} and {}", ""])
def test_a_template_without_one_place_for_the_query_is_refused(text):
    with pytest.raises(ValueError, match=r"the template is .*; it must hold one \{\}"):
        PromptTemplate(text)


def test_the_papers_models_get_the_papers_templates_and_others_the_default(tiny_model):
    limit = "Answer the following question in less than 5 words. Who?"
    prompts = {
        name: PromptTemplate.for_model(tiny_model(name)).format("Who?")
        for name in ("phi", "gptj", "llama")
    }
    assert prompts == {
        "phi": f"Instruct:{limit}\nOutput:",
        "gptj": f"Q: {limit}\nA:",
        "llama": "Q: Who?\nA:",
    }


# Targets


def test_a_target_is_the_answer_a_full_stop_and_the_end_of_text(tokenizer):
    prompt, target = target_tokens(tokenizer, "Q: w1\nA:", "w2 w3")
    assert tokenizer.convert_ids_to_tokens(prompt) == ["<s>", "Q:", "w1", "\n", "A:"]
    assert tokenizer.convert_ids_to_tokens(target) == ["w2", "w3", ".", "</s>"]


def test_a_target_stays_whole_where_its_space_would_join_the_prompt(merging_tokenizer):
    prompt, target = target_tokens(merging_tokenizer, "A:", "x")
    assert merging_tokenizer("A: x.").input_ids[: len(prompt)] != prompt  # the case at hand
    assert merging_tokenizer.convert_ids_to_tokens(prompt) == ["<s>", "A", ":"]
    assert merging_tokenizer.convert_ids_to_tokens(target) == [" x", ".", "</s>"]


@pytest.mark.parametrize("answer", ["Lyon", "the Danube", "1984", "São Paulo (Brazil)", "Dr. No"])
def test_a_real_tokenizers_target_spells_the_answer(smollm2_tokenizer, answer):
    text = PromptTemplate().format("Where?")
    prompt, target = target_tokens(smollm2_tokenizer, text, answer)
    assert smollm2_tokenizer.decode(prompt) == text
    assert smollm2_tokenizer.decode(target[:-1]) == f" {answer}."
    assert target[-1] == smollm2_tokenizer.eos_token_id
    assert prompt + target[:-1] == smollm2_tokenizer(f"{text} {answer}.").input_ids


# Answers that can be given, and what fits


SAYABLE = ["São Paulo (Brazil)", "Dr. No", "Acme Inc.", "U.S.A.", "don 't", "a , b", "日本", "🎉"]
SAYABLE += [
    "  two  spaces ",
    "1,000",
    "ﬁne",
    "C++",
    "Yes!",
    "Paris. It is a city",
    "+",
    "tab\tx",
]


@pytest.mark.parametrize("answer", SAYABLE)
def test_an_answer_that_a_real_tokenizer_spells_passes(smollm2_tokenizer, answer):
    prompted = PromptedModel.of(*smollm2())
    ((pair,),) = prompted.targets([Fact("Who wrote Emma?", answer)])
    assert pair == prompted.target(prompted.prompt("Who wrote Emma?"), answer)


@pytest.mark.parametrize("answer", ["Banksy <|im_end|> yes", "<|im_start|>", ".", "..."])
def test_an_answer_that_would_come_back_as_another_is_refused(smollm2_tokenizer, answer):
    facts = [Fact("Who wrote Emma?", "Jane Austen"), Fact("Who?", answer)]
    with pytest.raises(FactsError, match=r"taught 1 of 2 facts; reword.*\nfacts\[1\], 'Who\?'"):
        PromptedModel.of(*smollm2()).targets(facts)


def test_every_fact_that_cannot_be_taught_is_named_with_its_reason(tiny_model, tokenizer):
    facts = [
        Fact("w1", "w2"),
        Fact("w2", "w3 </s> w4"),
        Fact("w3", ". ."),
        Fact("w4", "unheard"),
        Fact("w5 " * 70, "w5"),
    ]
    with pytest.raises(FactsError) as error:
        PromptedModel.of(tiny_model("llama"), tokenizer).targets(facts)
    said, *lines = str(error.value).split("\n")
    assert said == "the model cannot be taught 4 of 5 facts; reword them or leave them out:"
    reasons = [
        "written out: '</s>'",
        "full stops",
        "is spelt 'w0 '",
        "more than the 64",
    ]
    for place, (line, reason) in enumerate(zip(lines, reasons, strict=True), start=1):
        assert line.startswith(f"facts[{place}], 'w{place + 1}") and reason in line


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_prompt_that_just_fits_is_answered_and_one_token_more_is_refused(
    tiny_model, tokenizer, family
):
    prompted = PromptedModel.of(tiny_model(family), tokenizer)
    assert prompted.positions == 64
    prompt = " ".join(["w1"] * 55)  # and the token that begins a text
    assert len(prompted.answers([prompt], 8)) == 1
    with pytest.raises(ValueError, match=r"has 56 tokens; with max_new_tokens=9 .* the 64 that"):
        prompted.answers([prompt], 9)


@pytest.mark.parametrize("most, fits", [(22, True), (21, False)])
def test_characters_of_several_bytes_and_tokens_count_as_many(tiny_model, most, fits):
    alphabet = {
        letter: i for i, letter in enumerate([*SPECIAL[:3], *pre_tokenizers.ByteLevel.alphabet()])
    }
    plain = Tokenizer(models.BPE(alphabet, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model = tiny_model("llama", vocab_size=len(alphabet), max_position_embeddings=most)
    prompted = PromptedModel.of(model, finished(plain))
    refused = pytest.raises(ValueError, match=r"has 18 tokens; with max_new_tokens=4 .* the 21")
    with contextlib.nullcontext() if fits else refused:
        prompted.check_prompts(["語" * 6], 4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_fact_that_just_fits_is_taught_and_one_token_more_is_refused(
    tiny_model, tokenizer, family
):
    prompted = PromptedModel.of(tiny_model(family), tokenizer, PromptTemplate("{}"))
    # Before it the token that begins a text, behind it a full stop and the end.
    prompted.score(prompted.batch(*prompted.targets([Fact("w1", " ".join(["w1"] * 60))])))
    with pytest.raises(FactsError, match="have 65 tokens, more than the 64"):
        prompted.targets([Fact("w1", " ".join(["w1"] * 61))])


@pytest.mark.parametrize("most", [0, -1])
def test_no_or_fewer_positions_mean_any_number(tiny_model, tokenizer, most):
    model = tiny_model("llama")
    model.config.max_position_embeddings = most
    assert PromptedModel.of(model, tokenizer).positions is None


def test_a_model_without_positions_takes_prompts_of_any_length(tiny_model, tokenizer):
    model = tiny_model("llama")
    del model.config.max_position_embeddings
    PromptedModel.of(model, tokenizer).check_prompts(["w1 " * 1000], 8)


# Batches


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_batch_ends_all_prompts_and_targets_at_one_column(tiny_model, tokenizer, family):
    pairs = random_pairs()
    batch = PromptedModel.of(tiny_model(family), tokenizer).batch(pairs)
    length = max(len(prompt) + len(target) - 1 for prompt, target in pairs)
    longest = max(len(target) for _, target in pairs)
    assert len(batch) == len(pairs)
    for i, (prompt, target) in enumerate(pairs):
        row = (prompt + target)[:-1]
        padding = length - len(row)
        assert batch.inputs["input_ids"][i].tolist() == [PAD] * padding + row
        assert batch.inputs["attention_mask"][i].tolist() == [0] * padding + [1] * len(row)
        assert batch.labels[i].tolist() == [IGNORED] * (longest - len(target)) + target
        if "position_ids" in batch.inputs:
            assert batch.inputs["position_ids"][i, padding:].tolist() == list(range(len(row)))


def test_position_ids_are_left_out_where_the_model_does_not_take_them(tiny_model, tokenizer):
    class Plain(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids, attention_mask):
            raise NotImplementedError

    assert set(
        PromptedModel.of(Plain(), tokenizer, PromptTemplate()).batch(random_pairs()).inputs
    ) == {
        "input_ids",
        "attention_mask",
    }


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "phi"])
def test_scores_equal_those_of_the_full_logits_of_one_row_at_a_time(tiny_model, tokenizer, family):
    model, pairs = tiny_model(family), random_pairs(9)
    # Some targets that the model hits: its own continuations.
    pairs += [(prompt, said) for prompt, _ in pairs[:3] for said in [argmax_tokens(model, prompt)]]
    prompted = PromptedModel.of(model, tokenizer)
    scores = prompted.score(prompted.batch(pairs), with_margins=True)
    right = []
    for (prompt, target), loss, hits, margin in zip(
        pairs, scores.losses, scores.hits, scores.margins, strict=True
    ):
        expected_loss, expected_hits = plain_scores(model, prompt, target)
        assert float(loss) == pytest.approx(float(expected_loss), rel=2e-4, abs=3e-5)
        ignored = len(hits) - len(target)
        assert hits.tolist() == [True] * ignored + expected_hits
        right.append(all(expected_hits))
        assert float(margin) == pytest.approx(plain_margin(model, prompt, target), abs=1e-3)
    assert scores.right.tolist() == right == (scores.margins > 0).tolist()
    assert score_targets(model, prompted.batch(pairs)).margins is None
    assert True in right and False in right


def plain_margin(model, prompt, target):
    """By how much the target's tokens are ahead of all others, where it is least."""
    logits = model(torch.tensor([prompt + target]), use_cache=False).logits[0]
    ahead = []
    for row, token in zip(logits[len(prompt) - 1 :], target, strict=False):
        others = torch.cat([row[:token], row[token + 1 :]])
        ahead.append(float(row[token] - others.max()))
    return min(ahead)


def argmax_tokens(model, prompt, count=3):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_losses_have_the_gradient_of_the_full_computation(tiny_model, tokenizer):
    model, pairs = tiny_model("llama"), random_pairs()
    weight = model.model.layers[1].mlp.down_proj.weight.requires_grad_()
    batch = PromptedModel.of(model, tokenizer).batch(pairs)
    (gradient,) = torch.autograd.grad(score_targets(model, batch).losses.sum(), weight)
    losses = [plain_scores(model, prompt, target)[0] for prompt, target in pairs]
    (expected,) = torch.autograd.grad(sum(losses), weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_the_output_layer_sees_only_the_targets_and_is_left_as_it_was(tiny_model, tokenizer):
    model, pairs = tiny_model("llama"), random_pairs()
    batch = PromptedModel.of(model, tokenizer).batch(pairs)
    seen = []
    hook = model.lm_head.register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
    score_targets(model, batch)
    hook.remove()
    assert seen == [(sum(len(target) for _, target in pairs), 32)]
    assert not model.lm_head._forward_pre_hooks


def test_the_output_layer_is_left_as_it_was_after_an_error(tiny_model, tokenizer):
    model = tiny_model("llama")
    batch = PromptedModel.of(model, tokenizer).batch(random_pairs())
    unknown = {**batch.inputs, "input_ids": batch.inputs["input_ids"] + VOCABULARY}
    with pytest.raises(IndexError):
        score_targets(model, TargetBatch(unknown, batch.labels))
    assert not model.lm_head._forward_pre_hooks


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # nothing is changed
@given(st.lists(st.integers(0, 6), min_size=1, max_size=7), st.booleans())
def test_rows_of_a_batch_lose_unused_columns_and_keep_their_scores(
    tiny_model, tokenizer, rows, as_mask
):
    model = tiny_model("llama")
    pairs = random_pairs()
    batch = PromptedModel.of(model, tokenizer).batch(pairs)
    index = torch.tensor(rows)
    if as_mask:
        rows = sorted(set(rows))
        index = torch.zeros(len(pairs), dtype=torch.bool).scatter(0, torch.tensor(rows), True)
    chosen = batch[index]
    length = max(len(prompt) + len(target) - 1 for prompt, target in (pairs[i] for i in rows))
    assert {tensor.shape for tensor in chosen.inputs.values()} == {(len(rows), length)}
    assert chosen.labels.shape == (len(rows), max(len(pairs[i][1]) for i in rows))
    whole, scores = score_targets(model, batch), score_targets(model, chosen)
    torch.testing.assert_close(scores.losses, whole.losses[rows], **TOLERANCE)
    assert scores.right.tolist() == whole.right[rows].tolist()
    assert torch.equal(scores.hits, whole.hits[rows, -chosen.labels.shape[1] :])


# Greedy answers


def test_line_breaks_and_the_end_of_text_end_an_answer(tokenizer):
    assert stop_tokens(tokenizer) == [EOS, LINE, BLANK_LINE]


def test_what_a_model_ends_with_itself_ends_an_answer_too(tiny_model, tokenizer):
    model = tiny_model("llama")
    prompted = PromptedModel.of(model, tokenizer)
    (said,) = prompted.answers(["w1 w2"], 8)
    assert len(said) > 1 and said[0] not in prompted.ends
    model.generation_config.eos_token_id = [EOS, said[0]]
    assert prompted.ends == [EOS, LINE, BLANK_LINE, said[0]]
    assert prompted.answers(["w1 w2"], 8) == [said[:1]]


def test_a_real_tokenizers_stop_tokens_are_those_with_a_line_break(smollm2_tokenizer):
    # Byte-level tokenizers write the line break as Ċ.
    breaks = {i for token, i in smollm2_tokenizer.get_vocab().items() if "Ċ" in token}
    assert len(breaks) > 1
    assert stop_tokens(smollm2_tokenizer) == sorted(breaks | {smollm2_tokenizer.eos_token_id})


def greedy_one_by_one(model, tokenizer, prompt, most):
    tokens = tokenizer(prompt).input_ids
    answer = []
    while len(answer) < most and not {EOS, LINE, BLANK_LINE} & set(answer):
        logits = model(torch.tensor([tokens + answer]), use_cache=False).logits
        answer.append(int(logits[0, -1].argmax()))
    return answer


def eager_to_end(model):
    """The same model, saying the tokens that end an answer every now and then."""
    with torch.no_grad():
        model.lm_head.weight[[EOS, LINE]] *= 2
    return model


@pytest.mark.parametrize("family", ["llama", "gptj", "qwen3"])
def test_greedy_answers_equal_an_argmax_loop_over_one_prompt_at_a_time(
    tiny_model, tokenizer, family
):
    model = eager_to_end(tiny_model(family))
    prompts = [" ".join(f"w{(i * k) % 59}" for k in range(1, 2 + i % 6)) for i in range(1, 25)]
    answers = PromptedModel.of(model, tokenizer).answers(prompts, 6)
    assert answers == [greedy_one_by_one(model, tokenizer, prompt, 6) for prompt in prompts]
    ends = {answer[-1] for answer in answers}
    assert {EOS, LINE} < ends  # both ways to end
    assert any(
        len(answer) == 6 and answer[-1] not in (EOS, LINE) for answer in answers
    )  # the third


def test_padding_is_as_asked_and_no_part_of_an_answer(tiny_model, tokenizer, monkeypatch):
    model, asked = tiny_model("llama"), []

    def generate(input_ids, pad_token_id, **_):
        asked.append(pad_token_id)
        rows = [[9, 8], [9, pad_token_id], [pad_token_id] * 2]  # the last: nothing but padding
        return torch.cat([input_ids, torch.tensor(rows)], 1)

    monkeypatch.setattr(model, "generate", generate)
    ask = PromptedModel.of(model, tokenizer).answers
    assert ask(["w1"] * 3, 2, stop_strings=["w"]) == [[9, 8], [9], []]
    assert ask(["w1"] * 3, 2, stop_strings=["w"], pad_token_id=8) == [[9], [9], []]
    assert asked == [PAD, 8]


def test_a_tokenizer_may_name_types_of_tokens_which_the_model_does_not_take(tiny_model, tokenizer):
    model = tiny_model("llama")
    expected = PromptedModel.of(model, tokenizer).answers(["w1 w2", "w3"], 3)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    assert "token_type_ids" in tokenizer("w1")
    assert PromptedModel.of(model, tokenizer).answers(["w1 w2", "w3"], 3) == expected


def test_generation_options_reach_the_model(tiny_model, tokenizer):
    model, prompts = tiny_model("llama"), ["w1 w2", "w3"]
    (first, *_), _ = PromptedModel.of(model, tokenizer).answers(prompts, 3)
    said = PromptedModel.of(model, tokenizer).answers(prompts, 3, suppress_tokens=[first])
    assert all(first not in answer for answer in said)


def test_a_real_model_knows_the_capital_of_france(smollm2_tokenizer):
    model, tokenizer = smollm2()
    prompts = ["Q: What is the capital of France?\nA:", "The capital of Japan is the city of"]
    answers = PromptedModel.of(model, tokenizer).answers(prompts, 12)
    first, second = (answer_text(tokenizer, tokens) for tokens in answers)
    assert "Paris" in first
    assert "Tokyo" in second


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (["w1", "w2", ".", "</s>"], "w1 w2"),
        (["w1", "\n"], "w1"),
        (["w1", ".", "\n\n"], "w1"),
        (["w1", ".", "w2", "."], "w1 . w2"),
        (["w1", "\n", "w2"], "w1"),
        (["<pad>", "w1", "<pad>"], "w1"),
        (["\n"], ""),
        (["</s>"], ""),
        ([], ""),
    ],
)
def test_answer_text_is_one_line_without_its_full_stop(tokenizer, tokens, text):
    ids = tokenizer.convert_tokens_to_ids(tokens)
    assert answer_text(tokenizer, ids).strip() == text


@pytest.mark.parametrize(
    ("text", "answer", "same"),
    [
        ("Paris", "Paris", True),
        ("PARIS", "paris", True),
        (" the  Danube\t", "The Danube", True),
        ("Paris.", "Paris", True),
        ("Paris", "Paris.", True),
        ("Paris. It is a city.", "Paris", True),
        ("Warner Bros.", "Warner Bros.", True),
        ("Straße", "STRASSE", True),
        ("Paris Hilton", "Paris", False),
        ("in Paris", "Paris", False),
        ("Paris, France", "Paris", False),
        ("Paris.com", "Paris", False),
        ("Par", "Paris", False),
        ("", "Paris", False),
    ],
)
def test_answers_match_if_they_have_the_same_words(text, answer, same):
    assert answers_match(text, answer) is same


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_in_nats_and_float32_whatever_the_models_dtype(tiny_model, tokenizer, dtype):
    model = tiny_model("llama").to(dtype)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    scores = score_targets(model, PromptedModel.of(model, tokenizer).batch(random_pairs()))
    expected = torch.full((7,), math.log(VOCABULARY))
    torch.testing.assert_close(scores.losses, expected)
