"""Training on a toy problem: a neuron counts as right where it lies close to the collected one."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import logging

import pytest
import torch
from toy_training import CONDITION_DIM, LAYOUT, SHAPE, TOY, TOY_DIT, N, Toy, normalized, weights

from meg_kernels.diffusion import DiTConfig
from meg_kernels.editing import trial
from meg_kernels.editing.train import ConditionBatches, train_generator
from meg_kernels.editing.trial import Trial, sample_rows
from meg_kernels.familiarity import Rewording
from meg_kernels.routing.generators import GeneratorConfig, build_generator

TOYS = {"dit": TOY_DIT, "mlp": TOY}


@pytest.fixture
def toy():
    return Toy()


@pytest.mark.parametrize("kind", ["dit", "mlp"])
def test_a_network_learns_until_all_queries_are_answered(toy, kind):
    generator, training = toy.train(TOYS[kind])
    assert training.answered == 1.0
    assert training.steps < TOY.training.max_steps
    assert [step for step, *_ in training.history] == list(
        range(TOY.training.check_every, training.steps + 1, TOY.training.check_every)
    )
    *earlier, (_, _, _, off) = training.history
    assert not any(answered == 1 and off <= TOY.training.close for _, _, answered, off in earlier)
    wanted = generator.scaled_weights(toy.neurons)
    made = generator.scaled_weights(generator.generate(toy.conditions))
    assert off == pytest.approx(float((made - wanted).norm() / wanted.norm()), rel=1e-3)
    assert training.history[-1][1] < training.history[0][1]
    assert bool((toy.distances(generator.generate(toy.conditions)) < 0.3).all())
    assert not generator.training


@pytest.mark.parametrize(
    ("right", "enough", "share", "tried"),
    [
        (150, 1.0, 1.0, 150),
        (0, 0.0, 0.0, 150),
        (63, 1.0, 63 / 64, 64),
        (63, 149 / 150, 63 / 128, 128),
        (149, 149 / 150, 149 / 150, 150),
        (149, 1.0, 149 / 150, 150),
    ],
)
def test_once_too_few_queries_are_answered_the_rest_is_not_tried(right, enough, share, tried):
    asked = []

    def answers(neurons, rows):
        asked.append(len(rows))
        return rows < right

    trial = Trial(torch.zeros(150, CONDITION_DIM), torch.arange(150), answers)
    assert trial.answered(LAYOUT.unpack(torch.zeros(150, LAYOUT.dim)), enough) == share
    assert sum(asked) == tried


def test_what_was_reached_in_the_end_is_the_share_of_all_queries():
    """Trials that end early see a part of them."""
    toy = Toy(100)

    def answers(neurons, rows):
        return toy.only_the_collected(neurons, rows) | (rows < 40)

    _, training = toy.train(TOY.with_training(max_steps=20), answers=answers)
    assert training.answered == 0.4 != training.history[-1][2]


def test_a_training_that_need_not_answer_all_ends_when_it_answers_enough():
    toy = Toy(100)

    def answers(neurons, rows):
        return toy.only_the_collected(neurons, rows) | (rows % 20 > 0)

    config = TOY.with_training(enough=0.94, close=float("inf"))
    _, training = toy.train(config, answers=answers)
    assert training.answered == 0.95 and training.steps == TOY.training.check_every


def test_a_bank_answers_one_of_the_queries_that_share_a_condition():
    toy = Toy(100)
    toy.conditions[98:] = toy.conditions[0]
    _, training = toy.train(GeneratorConfig.bank())
    assert training.answered == 0.98


def test_trials_become_rarer_as_a_training_goes_on(toy):
    """Each costs as much as many steps do; a tenth more steps are worth another."""
    config = TOY.with_training(check_every=2, max_steps=70)
    _, training = toy.train(config, answers=toy.only_the_collected)
    steps = [step for step, *_ in training.history]
    assert steps == [*range(2, 41, 2), *range(44, 61, 4), 66, 70]


def test_neurons_that_answer_are_brought_closer_for_as_many_steps_again(toy):
    """Whichever comes first: that they are close, or twice the steps that the answers took."""

    def trials(close: float) -> list[tuple[int, float]]:
        _, training = toy.train(TOY.with_training(close=close))
        return [(step, off) for step, _, answered, off in training.history if answered == 1]

    far = trials(close=1e-9)
    first, _ = far[0]
    assert [step for step, _ in far] == list(range(first, 2 * first + 1, TOY.training.check_every))
    (step, off), (_, after) = far[0], far[1]
    assert trials(close=off) == [(step, off)]
    assert trials(close=(off + after) / 2) == far[:2]


def test_a_bank_answers_at_once(toy):
    bank, training = toy.train(GeneratorConfig.bank())
    assert (training.steps, training.answered, training.history) == (0, 1.0, ())
    assert toy.distances(bank.generate(toy.conditions)).max() < 1e-5


def test_training_ends_when_what_can_be_reached_is_reached(toy):
    def without_two(neurons, rows):
        return toy.answers(neurons, rows) & (rows >= 2)

    _, training = toy.train(answers=without_two)
    assert training.answered == pytest.approx(3 / 5)
    assert training.steps < TOY.training.max_steps


def rewording(seed=0, scale=0.3):
    """Of a hundred queries, with paraphrases close to them."""
    rng = torch.Generator().manual_seed(seed)
    queries, off = torch.randn(2, 100, CONDITION_DIM, generator=rng)
    return Rewording(*(normalized(z) for z in (queries, queries + scale * off)))


def back(generator, inputs):
    """The conditions whose standardised ones these are."""
    return inputs * generator.condition_std + generator.condition_mean


@pytest.mark.parametrize("reword", [True, False])
def test_half_of_the_conditions_are_of_other_wordings_or_noisy(toy, reword):
    generator = build_generator(TOY, LAYOUT, CONDITION_DIM)
    generator.standardize(toy.conditions, toy.neurons)
    conditions = ConditionBatches(generator, toy.conditions, rewording() if reword else None)
    exact = generator.scaled_conditions(toy.conditions)
    rng = torch.Generator().manual_seed(1)
    for _ in range(10):
        rows, inputs = conditions.draw(rng)
        assert len(rows.unique()) == TOY.training.batch_size
        off = (inputs - exact[rows]).norm(dim=1)
        assert bool((off[::2] == 0).all()) and bool((off[1::2] > 0).all())
        cosines = torch.cosine_similarity(toy.conditions[rows], back(generator, inputs), dim=1)
        known = (rewording().queries * rewording().paraphrases).sum(1)
        nearest = (cosines[1::2, None] - known).abs().amin(1)
        assert bool((nearest < 1e-5).all()) is reword


def test_a_generator_that_saw_other_wordings_makes_closer_neurons_of_more_of_them(toy):
    exact = TOY.with_training(condition_noise=0.0, max_steps=300)
    moved = rewording(seed=1)(toy.conditions, torch.Generator().manual_seed(0))
    off = []
    for seen in (rewording(), None):
        generator, _ = toy.train(exact, rewording=seen, answers=toy.only_the_collected)
        off.append(float(toy.distances(generator.generate(moved)).mean()))
    assert off[0] < 0.6 * off[1]


def test_enough_is_a_share_of_what_can_be_reached(toy):
    def without_one(neurons, rows):
        return toy.answers(neurons, rows) & (rows >= 1)

    # 0.7 of the four that can be reached are 2.8: three answers of five are enough.
    _, training = toy.train(TOY.with_training(enough=0.7), answers=without_one)
    assert training.answered >= 3 / 5 - 1e-6
    assert any(answered < 3 / 5 for _, _, answered, _ in training.history)
    assert training.steps < TOY.training.max_steps


def test_training_ends_with_the_steps_it_may_take(toy):
    config = TOY.with_training(max_steps=50)
    _, training = toy.train(config, answers=toy.only_the_collected)
    assert training.answered == 0
    assert training.steps == 50 and [step for step, *_ in training.history] == [20, 40, 50]


def test_the_loss_of_a_trial_is_the_mean_since_the_trial_before(toy):
    config = TOY.with_training(max_steps=50)
    generator, losses = build_generator(config, LAYOUT, CONDITION_DIM), []
    loss = generator.loss

    def noting(*args):
        losses.append(loss(*args))
        return losses[-1]

    generator.loss = noting
    training = train_generator(generator, toy.conditions, toy.neurons, toy.only_the_collected)
    means = [sum(losses[i : i + 20]).item() / len(losses[i : i + 20]) for i in (0, 20, 40)]
    assert [mean for _, mean, *_ in training.history] == pytest.approx(means, rel=1e-5)


def test_the_averaged_weights_are_those_that_generate(toy, monkeypatch):
    """Recomputed by hand from the weights after every step."""
    steps = []
    step = torch.optim.AdamW.step

    def noting(optimizer, *args, **kwargs):
        result = step(optimizer, *args, **kwargs)
        parameters = optimizer.param_groups[0]["params"]
        steps.append([parameter.detach().double().clone() for parameter in parameters])
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    config = TOY.with_training(max_steps=40, ema_decay=0.8)
    start = build_generator(config, LAYOUT, CONDITION_DIM)
    generator, training = toy.train(config)
    average = [parameter.detach().double() for parameter in start.parameters()]
    for number, new in enumerate(steps, 1):
        decay = min(0.8, number / (number + 10))
        average = [
            decay * mean + (1 - decay) * other for mean, other in zip(average, new, strict=True)
        ]
    assert training.steps == len(steps)
    for parameter, mean, last in zip(generator.parameters(), average, steps[-1], strict=True):
        torch.testing.assert_close(parameter.double(), mean, rtol=1e-5, atol=1e-6)
        assert (parameter - last).abs().max() > 1e-4
    assert torch.equal(toy.tried[-1], LAYOUT.pack(generator.generate(toy.conditions[order(N)])))


def order(n):
    return sample_rows(n, TOY.training.seed)


def interrupt_after_two_trials(toy, config, work_folder):
    """Train until two trials are saved."""
    trials = []

    def interrupted(neurons, rows):
        trials.append(rows)
        if len(trials) == 4:  # one on the collected neurons, two that were saved
            raise KeyboardInterrupt
        return toy.only_the_collected(neurons, rows)

    with pytest.raises(KeyboardInterrupt):
        toy.train(config, answers=interrupted, work_folder=work_folder)


@pytest.mark.parametrize("kind", ["dit", "mlp"])
def test_an_interrupted_training_ends_with_the_weights_of_an_uninterrupted_one(toy, tmp_path, kind):
    config = TOYS[kind].with_training(max_steps=90, enough=1.0)

    whole, expected = toy.train(config, answers=toy.only_the_collected)

    interrupt_after_two_trials(toy, config, tmp_path)
    toy.tried.clear()
    resumed, training = toy.train(config, answers=toy.only_the_collected, work_folder=tmp_path)
    assert len(toy.tried) == 1 + 3  # at 60, 80 and 90 steps
    assert training == expected
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=1e-5, atol=1e-6)


def test_seconds_go_on_where_an_interruption_ended_them(toy, tmp_path, monkeypatch):
    config, clock = TOY.with_training(max_steps=90, enough=1.0), itertools.count()
    monkeypatch.setattr("meg_kernels.editing.fit.time.perf_counter", lambda: next(clock))
    interrupt_after_two_trials(toy, config, tmp_path)
    _, training = toy.train(config, answers=toy.only_the_collected, work_folder=tmp_path)
    # The clock moves on by one whenever it is read: at the start, and at each trial.
    assert [step for step, *_ in training.history] == [20, 40, 60, 80, 90]
    assert training.seconds == (1, 2, 3, 4, 5) and training.seconds_before == 2


def test_a_finished_training_is_not_done_again(toy, tmp_path, monkeypatch):
    first, training = toy.train(work_folder=tmp_path)

    def step(*args, **kwargs):
        raise AssertionError("a step was taken")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    again, repeated = toy.train(work_folder=tmp_path)
    assert repeated == training
    assert torch.equal(weights(again), weights(first))


def test_a_damaged_checkpoint_starts_again_with_a_warning(toy, tmp_path, caplog):
    whole, expected = toy.train(work_folder=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-50])
    with caplog.at_level(logging.WARNING):
        again, training = toy.train(work_folder=tmp_path)
    assert f"{file} is truncated" in caplog.text and "training starts again" in caplog.text
    assert training == expected
    assert torch.equal(weights(again), weights(whole))


def test_a_checkpoint_of_other_data_or_settings_is_not_taken(toy, tmp_path):
    toy.train(work_folder=tmp_path)
    others = [{"seed": 1}, {"learning_rate": 1e-3}, {"rewording": rewording()}]
    others += [{"rewording": rewording(seed=1)}, {}]
    for number, change in enumerate(others):
        wordings = change.pop("rewording", None)
        config = TOY.with_training(max_steps=20, **change)
        if number == len(others) - 1:
            toy.conditions = -toy.conditions
        clean, expected = toy.train(config, rewording=wordings)
        mixed, training = toy.train(config, rewording=wordings, work_folder=tmp_path)
        assert training == expected
        assert torch.equal(weights(mixed), weights(clean))
        assert len(list(tmp_path.iterdir())) == number + 2


def test_further_training_keeps_the_scales_if_asked(toy):
    generator, _ = toy.train()
    before = copy.deepcopy(generator)
    further = Toy()
    further.neurons = LAYOUT.unpack(3 * LAYOUT.pack(toy.neurons) + 1)
    for keep in (True, False):
        trained = copy.deepcopy(generator)
        train_generator(
            trained, further.conditions, further.neurons, further.answers, keep_scales=keep
        )
        for name in ("weight_mean", "weight_std"):
            assert torch.equal(getattr(trained, name), getattr(before, name)) == keep
        assert torch.equal(trained.condition_std, before.condition_std)
        assert bool((further.distances(trained.generate(further.conditions)) < 0.3).all())


def test_the_papers_preset_trains_on_a_small_network(toy):
    config = GeneratorConfig.paper(
        network=dataclasses.replace(DiTConfig.paper(), **SHAPE),
        learning_rate=1e-3,
        max_steps=60,
        check_every=20,
        batch_size=5,
    )
    # Weights of a few hundredths, as the preset's scale wants them.
    toy.neurons = LAYOUT.unpack(0.01 * LAYOUT.pack(toy.neurons))
    generator, training = toy.train(config, answers=toy.only_the_collected)
    losses = [loss for _, loss, *_ in training.history]
    assert len(losses) == 3 and all(torch.tensor(losses).isfinite())
    assert losses[-1] < losses[0]
    assert bool(generator.generate(toy.conditions).is_finite().all())


def test_no_more_queries_are_tried_than_needed(toy, monkeypatch):
    monkeypatch.setattr(trial, "MOST_TRIED", 3)
    _, training = toy.train()
    assert {len(tried) for tried in toy.tried} == {3}
    assert training.answered == 1.0


@pytest.mark.parametrize("conditions, neurons", [(N - 1, N), (N, N - 1), (0, 0)])
def test_conditions_and_neurons_must_pair_up(toy, conditions, neurons):
    generator = build_generator(TOY, LAYOUT, CONDITION_DIM)
    with pytest.raises(
        ValueError, match=f"{conditions} conditions and {neurons} neurons do not pair up"
    ):
        train_generator(generator, toy.conditions[:conditions], toy.neurons[:neurons], toy.answers)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["condition", "neuron"])
def test_data_that_is_not_finite_is_refused(toy, where, value):
    tensor = toy.conditions if where == "condition" else toy.neurons.value
    tensor[1, 2] = value
    with pytest.raises(ValueError, match="a condition or a neuron is not finite; collect it again"):
        toy.train()


def test_a_loss_that_becomes_nan_says_what_helps(toy):
    config = TOY.with_training(learning_rate=1e30)
    with pytest.raises(FloatingPointError, match="after 20 steps; try a smaller learning_rate"):
        toy.train(config)


@pytest.mark.parametrize("kind", ["dit", "mlp"])
def test_training_leaves_torchs_own_random_numbers_alone(toy, kind, undrawn):
    torch.manual_seed(5)
    first, _ = toy.train(TOYS[kind].with_training(max_steps=20))
    assert undrawn(5)
    torch.manual_seed(6)
    again, _ = toy.train(TOYS[kind].with_training(max_steps=20))
    assert torch.equal(weights(first), weights(again))
