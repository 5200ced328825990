"""The six metrics, against one query at a time: no batch, no padding, no cache, no sorting."""

from __future__ import annotations

import contextlib
import json
import statistics
from collections import Counter

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from meg_kernels.editing.evaluate import METRICS, Evaluation, Metrics
from meg_kernels.editing.prompting import PromptedModel, PromptTemplate
from meg_kernels.facts import Fact, LocalityQuery

VOCABULARY = 67  # of the tiny models
EOS, LINE, STOP = 1, 2, 3
SPECIAL = ["<pad>", "</s>", "\n", ".", ").", "Q:", "A:"]
WORDS = [f"w{i}" for i in range((VOCABULARY - len(SPECIAL) - 2) // 2)]
MOST = 8
LAYER = 1
# Shares are sums of a few dozen float32 fractions.
SHARES = 1e-6


def make_tokenizer(add_space: bool = False) -> transformers.PreTrainedTokenizerFast:
    """Words with their spaces, as SentencePiece has them; `add_space` to the text's beginning."""
    pieces = [*SPECIAL, "▁", "▁Q:", *WORDS, *(f"▁{word}" for word in WORDS)]
    plain = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, "w0"))
    spaces = [normalizers.Prepend("▁")] * add_space + [normalizers.Replace(" ", "▁")]
    plain.normalizer = normalizers.Sequence(spaces)
    plain.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("▁", "merged_with_next"),
            pre_tokenizers.Split(Regex(r"\n|\)?\."), "isolated"),
        ]
    )
    plain.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="<pad>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model(tiny_model):
    """A random model that says words with their spaces, full stops and ends."""
    model = tiny_model("llama")
    weight = torch.zeros(VOCABULARY, 1)
    weight[-len(WORDS) :] = 1
    weight[[EOS, LINE, STOP]] = torch.tensor([[1.5], [1.5], [0.8]])
    with torch.no_grad():
        model.lm_head.weight *= weight
    return model


def prompted(model, tokenizer) -> PromptedModel:
    return PromptedModel.of(model, tokenizer, PromptTemplate())


def question(i: int) -> str:
    return " ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 2 + i % 5))


def in_template(query, fact):
    return f"Q: {query}\nA:"


def argmax_tokens(model, tokenizer, query, fact=None, prompting=in_template):
    tokens, answer = tokenizer(prompting(query, fact)).input_ids, []
    while len(answer) < MOST and not {EOS, LINE} & set(answer):
        logits = model(torch.tensor([tokens + answer]), use_cache=False).logits
        answer.append(int(logits[0, -1].argmax()))
    return answer


def spelt(tokenizer, tokens):
    """The answer's words, as a person reads them."""
    text = "".join(tokenizer.decode([t]) for t in tokens if t > LINE)
    return text.strip().removesuffix(".").strip()


@pytest.fixture
def facts(model, tokenizer):
    """Facts of which the model knows some, some only by the answer's first word, and some not."""
    facts = []
    for i in range(16):
        words = spelt(tokenizer, argmax_tokens(model, tokenizer, question(i))).split(".")[0].split()
        answer = " ".join([words, [*words[:1], WORDS[i]], [WORDS[i], WORDS[i + 1]]][i % 3][:5])
        facts.append(
            Fact(
                question(i),
                answer or WORDS[i],
                id=str(i),
                paraphrases=(question(i), question(i + 29))[: i % 4],
                locality=tuple(LocalityQuery(question(100 + 3 * i + k)) for k in range(i % 3)),
            )
        )
    return facts


class Shift:
    """An edit that needs no library: to the FFN of one layer it adds a vector for each query."""

    def __init__(self, model, size: float):
        self.feed_forward, self.size = model.model.layers[LAYER].mlp, size
        self.mounted = []

    @contextlib.contextmanager
    def __call__(self, queries, facts):
        self.mounted += zip(queries, facts, strict=True)
        added = torch.stack([self._vector(query) for query in queries]).unsqueeze(1)
        hook = self.feed_forward.register_forward_hook(lambda _, __, output: output + added)
        try:
            yield
        finally:
            hook.remove()

    def _vector(self, query):
        generator = torch.Generator().manual_seed(sum(map(ord, query)))
        return self.size * torch.randn(32, generator=generator)


def slow_metrics(model, tokenizer, facts, mounting, prompting=in_template):
    """The definitions, spelt out for one query after the other."""
    shares = {name: [] for name in METRICS}
    for i, fact in enumerate(facts):
        queries = [("reliability", fact.query)]
        queries += [("generality", query) for query in fact.paraphrases]
        queries += [("locality", other.query) for other in fact.locality]
        for kind, query in queries:
            before = argmax_tokens(model, tokenizer, query) if kind == "locality" else None
            with mounting([query], [i]):
                after = argmax_tokens(model, tokenizer, query, i, prompting)
                if kind == "locality":
                    wanted, right = before, after == before
                else:
                    wanted = tokenizer(f" {fact.answer}").input_ids
                    said = spelt(tokenizer, after).casefold()
                    answer = fact.answer.casefold()
                    right = said == answer or said.startswith(f"{answer}. ")
                prompt = tokenizer(prompting(query, i)).input_ids
                logits = model(torch.tensor([prompt + wanted]), use_cache=False).logits[0]
            hits = [int(logits[len(prompt) - 1 + k].argmax()) == t for k, t in enumerate(wanted)]
            shares[f"{kind}_ag"].append(right)
            shares[f"{kind}_tf"].append(sum(hits) / len(hits))
    return {name: statistics.fmean(values) for name, values in shares.items()}


def shares(metrics: Metrics):
    return {name: getattr(metrics, name) for name in METRICS}


def test_metrics_equal_those_of_one_query_at_a_time(model, tokenizer, facts):
    edit = Shift(model, 0.2)
    expected = slow_metrics(model, tokenizer, facts, edit)
    assert all(0 < value < 1 for value in expected.values())  # the oracle has something to say
    base = slow_metrics(model, tokenizer, facts, lambda *_: contextlib.nullcontext())
    for batch_size in (1, 5, 64):
        evaluation = Evaluation(prompted(model, tokenizer), facts, MOST, batch_size)
        assert shares(evaluation.edited(edit)) == pytest.approx(expected, abs=SHARES)
        assert shares(evaluation.base()) == pytest.approx(base, abs=SHARES)


def test_each_query_is_mounted_with_its_own_fact(model, tokenizer, facts):
    edit = Shift(model, 0.2)
    Evaluation(prompted(model, tokenizer), facts, MOST, 5).edited(edit)
    expected = [
        (query, i)
        for i, fact in enumerate(facts)
        for query in (fact.query, *fact.paraphrases, *(other.query for other in fact.locality))
    ]
    assert set(edit.mounted) == set(expected)
    # Twice where the argmax must be asked for after the answer's beginning.
    assert Counter(expected) <= Counter(edit.mounted)


def test_an_edit_that_stands_in_the_prompt_is_asked_with_it_and_the_base_model_without(
    model, tokenizer, facts
):
    def prompting(query, fact):
        return f"Q: {facts[fact].answer}\nA: {query}\nA:"

    def plain(queries, owners):
        return contextlib.nullcontext()

    expected = slow_metrics(model, tokenizer, facts, plain, prompting)
    assert 0 < expected["locality_ag"] < expected["locality_tf"] < 1
    for batch_size in (5, 64):
        evaluation = Evaluation(prompted(model, tokenizer), facts, MOST, batch_size)
        metrics = Metrics.of(evaluation.verdicts(plain, prompting=prompting))
        assert shares(metrics) == pytest.approx(expected, abs=SHARES)


def test_an_interrupted_evaluation_asks_only_what_was_not_answered(
    model, tokenizer, facts, tmp_path
):
    def evaluation(edits, asked=facts):
        options = {"batch_size": 5, "work_folder": tmp_path, "identity": edits}
        return Evaluation(prompted(model, tokenizer), asked, MOST, **options)

    edit, other = Shift(model, 0.2), Shift(model, 0.3)
    expected = Evaluation(prompted(model, tokenizer), facts, MOST, 5).edited(edit)
    mounted, edit.mounted = edit.mounted, []
    evaluation([1]).edited(edit)
    files = sorted(tmp_path.glob("edited-*/*.json"))
    assert edit.mounted == mounted and len(files) > 2
    files[1].unlink()
    edit.mounted = []
    resumed = evaluation([1])
    assert resumed.edited(edit) == expected
    assert 0 < len(edit.mounted) < len(mounted)
    edit.mounted = []
    assert evaluation([1]).edited(edit) == expected and not edit.mounted
    # Neither other edits, nor other facts, nor another model get these answers.
    assert evaluation([2]).edited(other) != expected and len(other.mounted) >= len(facts)
    evaluation([1], facts[1:]).edited(edit)
    assert edit.mounted
    weight = model.get_output_embeddings().weight
    with torch.no_grad():
        before = weight.clone()
        weight[0] += 1
        try:
            count = len([*tmp_path.glob("base-*")])
            evaluation([1]).base()
            assert len([*tmp_path.glob("base-*")]) == count + 1
        finally:
            weight.copy_(before)


def test_edits_that_nothing_tells_from_others_are_asked_every_time(
    model, tokenizer, facts, tmp_path
):
    evaluation = Evaluation(prompted(model, tokenizer), facts, MOST, work_folder=tmp_path)
    edit = Shift(model, 0.2)
    first = evaluation.edited(edit)
    count, edit.mounted = len(edit.mounted), []
    assert evaluation.edited(edit) == first and len(edit.mounted) == count
    assert not [*tmp_path.glob("edited-*")]


@pytest.mark.parametrize("batch_size", [5, 64])
def test_the_base_models_locality_is_exactly_one(model, tokenizer, facts, batch_size):
    evaluation = Evaluation(prompted(model, tokenizer), facts, MOST, batch_size)
    for metrics in (evaluation.base(), evaluation.base()):
        assert metrics.locality_ag == metrics.locality_tf == 1


def test_an_edit_of_size_zero_changes_no_metric(model, tokenizer, facts):
    evaluation = Evaluation(prompted(model, tokenizer), facts, MOST)
    assert evaluation.edited(Shift(model, 0.0)) == evaluation.base()


def test_the_more_an_edit_changes_other_answers_the_lower_is_locality(model, tokenizer, facts):
    evaluation = Evaluation(prompted(model, tokenizer), facts, MOST)
    gentle, strong = (evaluation.edited(Shift(model, size)) for size in (0.1, 30.0))
    assert 1 > gentle.locality_ag > strong.locality_ag
    assert 1 > gentle.locality_tf > strong.locality_tf


def test_locality_of_facts_without_locality_queries_is_none_and_so_is_the_score(model, tokenizer):
    evaluation = Evaluation(prompted(model, tokenizer), [Fact("w1", "w2")], MOST)
    metrics = evaluation.edited(Shift(model, 0.2))
    assert metrics.reliability_ag is not None and metrics.reliability_tf is not None
    assert metrics.generality_ag is metrics.generality_tf is None
    assert metrics.locality_ag is metrics.locality_tf is metrics.score is None


def test_the_ceiling_asks_no_locality_query(model, tokenizer, facts):
    evaluation = Evaluation(prompted(model, tokenizer), facts, MOST, 5)
    edit = Shift(model, 0.2)
    edited = shares(evaluation.edited(edit))
    edit.mounted.clear()
    collected = shares(evaluation.collected(edit))
    assert {query for query, _ in edit.mounted} == {
        query for fact in facts for query in (fact.query, *fact.paraphrases)
    }
    assert collected == pytest.approx(edited | {"locality_ag": None, "locality_tf": None})


# Teacher forcing where the tokenizer makes it hard


@pytest.mark.parametrize("add_space", [False, True])
def test_answers_that_the_model_gives_anyway_are_all_hits(model, add_space):
    tokenizer = make_tokenizer(add_space)
    facts = []
    for i in range(40):
        said = spelt(tokenizer, argmax_tokens(model, tokenizer, question(i)))
        if said and "." not in said and len(said.split()) < MOST - 2:
            facts.append(Fact(question(i), said))
    assert len(facts) >= 5
    base = Evaluation(prompted(model, tokenizer), facts, MOST).base()
    assert base.reliability_ag == base.reliability_tf == 1


def test_the_end_of_an_answer_counts_where_it_shares_its_token_with_the_full_stop(model, tokenizer):
    word, following, *_ = spelt(tokenizer, argmax_tokens(model, tokenizer, question(0))).split()
    target = tokenizer(f" {word}).").input_ids
    assert tokenizer.convert_ids_to_tokens(target) == [f"▁{word}", ")."] and following != ")."
    fact = Fact(question(0), f"{word})")
    base = Evaluation(prompted(model, tokenizer), [fact], MOST).base()
    assert base.reliability_tf == 1 / 2


# Score, protocol, report


def test_the_score_is_the_harmonic_mean_of_the_six():
    values = [0.95, 0.97, 0.6, 0.74, 0.91, 0.96]
    metrics = Metrics(*values)
    assert metrics.score == pytest.approx(statistics.harmonic_mean(values))
    assert metrics.to_dict() == dict(zip(METRICS, values, strict=True)) | {"score": metrics.score}


def test_the_papers_score_follows_from_its_six_metrics():
    metrics = Metrics(0.9507, 0.9704, 0.5969, 0.7417, 0.9114, 0.9584)  # ZsRE 10k, Phi-2
    assert metrics.score == pytest.approx(0.8280, abs=5e-5)


@pytest.mark.parametrize("name", METRICS)
def test_the_score_is_zero_with_a_zero_and_none_with_nothing_to_measure(name):
    ones = dict.fromkeys(METRICS, 1.0)
    assert Metrics(**ones).score == 1
    assert Metrics(**ones | {name: 0.0}).score == 0
    assert Metrics(**ones | {name: None}).score is None


def test_the_protocol_says_what_is_needed_to_repeat_the_measurement(model, tokenizer, facts):
    template = PromptTemplate("Q: {}\nA:")
    protocol = Evaluation(PromptedModel.of(model, tokenizer, template), facts, MOST, 5).protocol()
    assert protocol["prompt_template"] == "Q: {}\nA:"
    assert protocol["decoding"].startswith(f"greedy, at most {MOST} tokens")
    assert protocol["queries"] == {
        "reliability": len(facts),
        "generality": sum(len(fact.paraphrases) for fact in facts),
        "locality": sum(len(fact.locality) for fact in facts),
    }
    assert (protocol["batch_size"], protocol["dtype"], protocol["device"]) == (5, "float32", "cpu")
    assert {"ag", "tf", "locality", "score"} < protocol.keys()


def test_a_report_holds_edited_and_base_metrics_protocol_and_seconds(model, tokenizer, facts):
    evaluation = Evaluation(prompted(model, tokenizer), facts, MOST)
    edit = Shift(model, 0.2)
    report = evaluation.report(edit, edit, protocol={"gate": "none"}, seconds={"collect": 1.23456})
    assert report.n == len(facts)
    assert report.metrics == evaluation.edited(edit)
    assert report.base == evaluation.base()
    assert report.collected == evaluation.collected(edit)
    assert report.protocol == evaluation.protocol() | {"gate": "none"}
    content = json.loads(json.dumps(report.to_dict()))
    assert content["seconds"].keys() == {"collect", "evaluate"}
    assert content["seconds"]["collect"] == 1.23
    assert content["metrics"]["score"] == report.metrics.score
    assert content["base"]["locality_ag"] == 1
    assert content["collected"]["locality_ag"] is None


def test_the_ceiling_is_left_out_unless_asked_for(model, tokenizer, facts):
    report = Evaluation(prompted(model, tokenizer), facts, MOST).report(Shift(model, 0.2))
    assert report.collected is None
    assert report.to_dict()["collected"] is None


@pytest.mark.parametrize("add_space", [False, True])
def test_an_answer_that_does_not_fit_is_refused(model, add_space):
    tokenizer = make_tokenizer(add_space)
    fact = Fact("w1", " ".join(WORDS[:6]))  # and a full stop, and the end of text
    Evaluation(prompted(model, tokenizer), [fact], max_new_tokens=8)
    with pytest.raises(
        ValueError, match=r"^max_new_tokens is 7, but the longest answer has 8 tokens$"
    ):
        Evaluation(prompted(model, tokenizer), [fact], max_new_tokens=7)


def test_an_evaluation_without_facts_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match=r"^there are no facts to evaluate$"):
        Evaluation(prompted(model, tokenizer), [])
