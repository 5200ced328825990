"""Distillation on a toy problem: what the student learns, when it has learnt it, what is left."""

from __future__ import annotations

import copy
import dataclasses
import functools

import numpy as np
import pytest
import torch
from tiny import (
    ANSWERS,
    CONFIG,
    FURTHER,
    GENERATORS,
    MOST,
    QUERIES,
    UNRELATED,
    interrupt,
    load,
    make_editor,
    saved_editor,
    state,
)
from toy_training import CONDITION_DIM, LAYOUT, SHAPE, TOY, TOY_DIT, Toy, weights

from meg_kernels.diffusion import DiTConfig, SamplerConfig
from meg_kernels.editing import distill as distilling
from meg_kernels.editing import stages
from meg_kernels.editing.distill import CLOSE, distill
from meg_kernels.editing.train import ConditionBatches, train_generator
from meg_kernels.routing.generators import GeneratorConfig, build_generator

TEACHER_STEPS = 12
EPS = torch.finfo(torch.float32).eps
ALPHAS_CUMPROD = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


@functools.cache
def trained(prediction="x0", **changes):
    config = dataclasses.replace(
        TOY_DIT,
        network=dataclasses.replace(TOY_DIT.network, prediction=prediction),
        sampler=SamplerConfig("ddim", TEACHER_STEPS),
    )
    generator, _ = Toy().train(config.with_training(**changes))
    return generator


def distilled(generator, steps=2, toy=None, **more):
    toy = toy or Toy()
    answers = more.pop("answers", toy.answers)
    more.setdefault("teacher_steps", TEACHER_STEPS)
    return distill(generator, toy.conditions, toy.neurons, answers, steps, **more)


def refuse(*args, **kwargs):
    raise AssertionError("the network was trained")


def with_training(generator, **changes):
    other = copy.deepcopy(generator)
    other.config = generator.config.with_training(**changes)
    return other


def level(t):
    """alpha and sigma at a timestep; at -1 the clean weights'."""
    alpha_squared = 1.0 if t < 0 else ALPHAS_CUMPROD[t]
    return alpha_squared**0.5, (1 - alpha_squared) ** 0.5


def timesteps(num_steps):
    return [round(1000 - i * 1000 / num_steps) - 1 for i in range(num_steps)]


def ddim_step(x_t, x0, t, after):
    (alpha, sigma), (next_alpha, next_sigma) = level(t), level(after)
    return next_alpha * x0 + next_sigma * (x_t - alpha * x0) / sigma


@torch.no_grad()
def trajectory(generator, conditions, num_steps):
    """The states [num_steps + 1, B, dim] of DDIM, by its formulas, in float64."""
    network = copy.deepcopy(generator.network).double().eval()
    rng = torch.Generator().manual_seed(generator.config.sampler.seed)
    x = torch.randn(generator.layout.dim, generator=rng).double().repeat(len(conditions), 1)
    states, asked = [x], timesteps(num_steps)
    for t, after in zip(asked, [*asked[1:], -1], strict=True):
        prediction = network(x, torch.full((len(x),), t), conditions.double())
        alpha, sigma = level(t)
        x0 = {
            "x0": lambda p: p,
            "v": lambda p, x=x, alpha=alpha, sigma=sigma: alpha * x - sigma * p,
            "noise": lambda p, x=x, alpha=alpha, sigma=sigma: (x - sigma * p) / alpha,
        }[network.prediction](prediction)
        x = ddim_step(x, x0, t, after)
        states.append(x)
    return torch.stack(states)


def sampled_neurons(generator, conditions, num_steps):
    """Standardised neurons by the formulas."""
    return trajectory(generator, generator.scaled_conditions(conditions), num_steps)[-1]


def distance(made, wanted):
    """Relative to the wanted weights, but to no less than one standard deviation each."""
    size = max(float(wanted.double().square().mean().sqrt()), 1.0)
    return float((made - wanted).double().square().mean().sqrt()) / size


# What is learnt


def lessons_of(generator, steps, teacher_steps=TEACHER_STEPS):
    teacher = distilling._sampled_in(teacher_steps, generator)
    student = copy.deepcopy(distilling._sampled_in(steps, generator))
    conditions = ConditionBatches(generator, Toy().conditions, None)
    return distilling._TrajectoryBatches(teacher, student, conditions), student


@pytest.mark.parametrize("prediction", ["x0", "v", "noise"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_one_step_of_a_lesson_is_many_of_the_teacher(prediction, steps):
    generator = trained(prediction, max_steps=40)
    lessons, _ = lessons_of(generator, steps)
    conditions, x_t, t, x0, _ = lessons._make(torch.Generator().manual_seed(1))
    states = trajectory(generator, conditions, TEACHER_STEPS)
    asked = timesteps(steps)
    assert sorted(set(t.tolist()), reverse=True) == asked
    stride = TEACHER_STEPS // steps
    for i, (here, after) in enumerate(zip(asked, [*asked[1:], -1], strict=True)):
        rows = t == here
        assert int(rows.sum()) == len(t) // steps
        reached = ddim_step(x_t[rows].double(), x0[rows].double(), here, after)
        expected = states[i * stride : (i + 1) * stride + 1 : stride, rows]
        atol = 16 * EPS * states.abs().max().item()
        torch.testing.assert_close(
            torch.stack([x_t[rows].double(), reached]), expected, rtol=0, atol=atol
        )


def test_half_of_the_lessons_are_on_conditions_with_the_trainings_noise():
    generator = with_training(trained(), condition_noise=0.3, batch_size=12)
    lessons, _ = lessons_of(generator, 1)
    rng = torch.Generator().manual_seed(1)
    many = 9 * torch.randn(12, CONDITION_DIM, generator=rng)
    lessons.conditions = ConditionBatches(generator, many, None)
    inputs = generator.scaled_conditions(many)
    offsets = []
    for _ in range(20):
        conditions = lessons._make(rng)[0]
        offsets.append((conditions[:, None] - inputs).square().mean(2).sqrt().amin(1))
    offsets = torch.cat(offsets)
    assert float((offsets == 0).float().mean()) == 0.5
    assert offsets[offsets > 0].mean().item() == pytest.approx(0.3, rel=0.1)


def test_lessons_are_renewed_at_every_trial_and_used_some_times_each():
    generator = with_training(trained(), check_every=50, batch_size=4)
    for steps, batches in ((1, 5), (2, 3), (4, 2)):  # 50 batches of 4 from 20 to 32 states
        lessons, _ = lessons_of(generator, steps)
        calls, rng, pools = [], torch.Generator().manual_seed(0), []
        lessons.teacher.network.register_forward_hook(lambda *call, calls=calls: calls.append(call))
        for step in range(101):
            before = len(calls)
            lessons.loss(step, rng)
            assert len(calls) - before == (batches * TEACHER_STEPS if step % 50 == 0 else 0)
            pools.append(lessons.pool[1])
        assert pools[1] is pools[49] is not pools[50] is pools[99] is not pools[100]
        assert len(pools[0]) == batches * 4 * steps


class Mistaken(torch.nn.Module):
    """A student that looks up the x_0 to be learnt and is wrong by `error` in each weight."""

    def __init__(self, pool, prediction):
        super().__init__()
        (self.conditions, self.states, self.times, self.x0, _), self.error = pool, 0.0
        self.prediction = prediction

    def forward(self, x_t, t, condition):
        same = (self.states[None] == x_t[:, None]).all(2) & (self.times[None] == t[:, None])
        same &= (self.conditions[None] == condition[:, None]).all(2)
        assert same.any(1).all()
        levels = torch.tensor([level(i) for i in t.tolist()], dtype=torch.float64)
        alpha, sigma = levels[:, :1], levels[:, 1:]
        x0 = self.x0[same.int().argmax(1)].double() + self.error
        return {
            "x0": lambda: x0,
            "v": lambda: (alpha * x_t - x0) / sigma,
            "noise": lambda: (x_t - alpha * x0) / sigma,
        }[self.prediction]()


@pytest.mark.parametrize("prediction", ["x0", "v", "noise"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_loss_is_the_error_of_the_weights_unless_that_blows_the_predictions_up(
    prediction, steps
):
    lessons, student = lessons_of(trained(prediction, max_steps=40), steps)
    lessons.loss(0, torch.Generator().manual_seed(2))
    student.network = mistaken = Mistaken(lessons.pool, prediction)
    assert lessons.loss(1, torch.Generator()).item() == pytest.approx(0, abs=1e-7)
    mistaken.error = 0.1
    losses = [lessons.loss(1, torch.Generator().manual_seed(seed)).item() for seed in range(200)]
    weights = [1.0] * steps
    if prediction == "noise":
        weights = [min(1.0, alpha / sigma) ** 2 for alpha, sigma in map(level, timesteps(steps))]
    assert min(losses) >= 0.1**2 * min(weights) * 0.99
    assert max(losses) <= 0.1**2 * max(weights) * 1.01
    assert np.mean(losses) == pytest.approx(0.1**2 * np.mean(weights), rel=0.1)


# Until it is learnt


@pytest.mark.parametrize(
    "prediction, steps", [("x0", 1), ("x0", 2), ("x0", 3), ("v", 1), ("v", 2), ("v", 4)]
)
def test_a_student_samples_in_a_few_steps_what_the_teacher_samples_in_many(prediction, steps):
    generator, toy = trained(prediction), Toy()
    before = weights(generator)
    student, report = distilled(generator, steps, toy)
    assert torch.equal(weights(generator), before)
    assert generator.config.sampler.num_steps == TEACHER_STEPS
    assert not student.training

    sampler = dataclasses.replace(generator.config.sampler, num_steps=steps)
    assert student.config == dataclasses.replace(generator.config, sampler=sampler)
    wanted = sampled_neurons(generator, toy.conditions, TEACHER_STEPS)
    neurons = student.generate(toy.conditions)
    made = student.scaled_weights(neurons)
    few = sampled_neurons(generator, toy.conditions, steps)
    assert distance(made, wanted) <= CLOSE * 1.001 < 0.5 * distance(few, wanted)
    assert toy.distances(neurons).max() < 0.3

    assert report.asked == len(toy.conditions)
    assert 0 < report.steps < TOY.training.max_steps
    collected = generator.scaled_weights(toy.neurons)
    for quality, neurons, num_steps in (
        (report.teacher, wanted, TEACHER_STEPS),
        (report.undistilled, few, steps),
        (report.student, made, steps),
    ):
        right = (
            toy.distances(
                LAYOUT.unpack(neurons.float() * generator.weight_std + generator.weight_mean)
            )
            < 0.3
        )
        assert quality.num_steps == num_steps
        assert quality.answered == pytest.approx(right.float().mean().item())
        assert quality.to_teacher == pytest.approx(distance(neurons, wanted), abs=1e-4)
        assert quality.to_collected == pytest.approx(distance(neurons, collected), abs=1e-4)
    assert report.history[-1][2:] == (report.student.answered, report.student.to_teacher)
    assert [step for step, *_ in report.history] == list(range(20, report.steps + 1, 20))
    for _, loss, answered, to_teacher in report.history[:-1]:
        assert np.isfinite(loss) and (answered < 1 or to_teacher > CLOSE)


def test_a_student_of_a_noise_predictor_comes_far_closer_than_its_steps_alone():
    generator = trained("noise")
    _, report = distilled(generator, 2)
    assert report.student.to_teacher < 0.1 * report.undistilled.to_teacher


def test_a_student_follows_its_teacher_on_other_conditions_too():
    generator, toy = trained("v"), Toy()
    student, _ = distilled(generator, 2, toy)
    jitter = torch.randn(toy.conditions.shape, generator=torch.Generator().manual_seed(9))
    nearby = toy.conditions + TOY.training.condition_noise * generator.condition_std * jitter
    wanted = sampled_neurons(generator, nearby, TEACHER_STEPS)
    assert distance(student.scaled_weights(student.generate(nearby)), wanted) < 3 * CLOSE


def test_a_generator_with_learned_variance_is_sampled_with_ddim_from_then_on():
    config = GeneratorConfig.paper(
        network=dataclasses.replace(DiTConfig.paper(), **SHAPE, condition_dropout=0.0),
        learning_rate=5e-3,
        standardize=True,
        max_steps=300,
        check_every=20,
        batch_size=5,
        ema_decay=0.9,
        sampler=SamplerConfig("ddpm", TEACHER_STEPS, "respaced", seed=3),
    )
    generator, _ = Toy().train(config)
    student, report = distilled(generator, 2)
    assert student.config.sampler == SamplerConfig("ddim", 2, "trailing", seed=3)
    assert report.student.to_teacher <= max(CLOSE, 0.2 * report.undistilled.to_teacher)
    wanted = sampled_neurons(generator, Toy().conditions, TEACHER_STEPS)
    made = student.scaled_weights(student.generate(Toy().conditions))
    assert distance(made, wanted) == pytest.approx(report.student.to_teacher, abs=1e-4)


def only_the_teachers(generator):
    """No student's neurons will do."""
    wanted = sampled_neurons(generator, Toy().conditions, TEACHER_STEPS)

    def answers(neurons, rows):
        return (generator.scaled_weights(neurons) - wanted[rows]).abs().amax(1) < 1e-4

    return answers


def test_close_neurons_are_not_enough_while_fewer_queries_are_answered():
    generator = with_training(trained(), max_steps=240)
    _, report = distilled(generator, 1, answers=only_the_teachers(generator))
    assert (report.teacher.answered, report.student.answered) == (1.0, 0.0)
    assert report.steps == 240 and report.student.to_teacher <= CLOSE


def test_answered_queries_are_not_enough_while_neurons_are_far_from_the_teachers():
    def all_right(neurons, rows):
        return torch.ones(len(neurons), dtype=torch.bool)

    _, report = distilled(trained(), 1, answers=all_right)
    assert report.undistilled.answered == 1.0 and report.undistilled.to_teacher > CLOSE
    assert report.steps > 0
    assert all(far > CLOSE for *_, far in report.history[:-1])
    assert report.student.to_teacher <= CLOSE


def test_a_teacher_that_answers_little_does_not_ask_for_more():
    def without_two(neurons, rows):
        return toy.answers(neurons, rows) & (rows >= 2)

    toy = Toy()
    _, report = distilled(trained(), 1, toy, answers=without_two)
    assert report.teacher.answered == report.student.answered == pytest.approx(3 / 5)
    assert report.steps < TOY.training.max_steps


def test_a_network_that_needs_no_steps_is_not_trained(monkeypatch, tmp_path):
    """As built, it predicts the mean neuron whatever it is asked."""
    monkeypatch.setattr(distilling, "fit", refuse)
    generator = build_generator(TOY_DIT, LAYOUT, CONDITION_DIM)
    student, report = distilled(generator, 1, work_folder=tmp_path)
    assert (report.steps, report.history) == (0, ())
    assert report.student == report.undistilled and report.student.to_teacher == 0
    assert student.config.sampler.num_steps == 1
    assert torch.equal(weights(student), weights(generator))


def test_a_single_fact_can_be_distilled():
    """Its standardised neuron is zero: there is nothing to be relative to."""
    toy = Toy()
    toy.conditions, toy.neurons = toy.conditions[:1], toy.neurons[:1]
    config = dataclasses.replace(TOY_DIT, sampler=SamplerConfig("ddim", 2))
    generator = build_generator(config, LAYOUT, CONDITION_DIM)
    train_generator(generator, toy.conditions, toy.neurons, toy.answers)
    _, report = distilled(generator, 1, toy)
    assert report.student.to_teacher <= CLOSE and report.student.answered == 1.0


# Interruptions and chance


def test_an_interrupted_distillation_ends_with_the_weights_of_an_uninterrupted_one(
    tmp_path, monkeypatch
):
    generator = with_training(trained(), max_steps=90)
    answers, asked, most = only_the_teachers(generator), [], 1000

    def noted(neurons, rows):
        asked.append(rows)
        if len(asked) > most:
            raise KeyboardInterrupt
        return answers(neurons, rows)

    whole, expected = distilled(generator, 1, answers=noted)
    assert expected.steps == 90
    first = 3  # the teacher, the generator as it is, and the student before any step
    assert len(asked) == first + 5 + 1  # at 20, 40, 60, 80 and 90 steps, and the result
    asked.clear()
    most = first + 2
    with pytest.raises(KeyboardInterrupt):
        distilled(generator, 1, answers=noted, work_folder=tmp_path)
    asked.clear()
    most = 1000
    resumed, report = distilled(generator, 1, answers=noted, work_folder=tmp_path)
    assert len(asked) == first + 3 + 1
    assert report == expected and report.seconds_before > 0 == expected.seconds_before
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=1e-5, atol=1e-6)

    monkeypatch.setattr(torch.optim.AdamW, "step", refuse)
    again, repeated = distilled(generator, 1, answers=noted, work_folder=tmp_path)
    assert repeated == report
    assert torch.equal(weights(again), weights(resumed))


def test_a_checkpoint_of_another_distillation_is_not_taken(tmp_path):
    brief = {"max_steps": 20, "check_every": 20}
    generator, other = with_training(trained(), **brief), with_training(trained(), **brief)
    with torch.no_grad():
        other.network.outLinear.bias += 0.01  # nothing else tells them apart
    for number, (teacher, steps, more) in enumerate(
        [
            (generator, 1, {}),
            (generator, 2, {}),
            (generator, 1, {"teacher_steps": 8}),
            (generator, 1, {"seed": 5}),
            (other, 1, {}),
        ]
    ):
        clean, expected = distilled(teacher, steps, **more)
        mixed, report = distilled(teacher, steps, work_folder=tmp_path, **more)
        assert report == expected and expected.steps == 20
        assert torch.equal(weights(mixed), weights(clean))
        assert len(list(tmp_path.iterdir())) == number + 1


def test_the_seed_alone_decides_the_weights(undrawn):
    generator = with_training(trained(), max_steps=20)
    torch.manual_seed(5)
    first, _ = distilled(generator)
    assert undrawn(5)
    torch.manual_seed(6)
    again, _ = distilled(generator, seed=generator.config.training.seed)
    other, _ = distilled(generator, seed=7)
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))
    assert (first.config.training.seed, other.config.training.seed) == (
        generator.config.training.seed,
        7,
    )


# Errors


@pytest.mark.parametrize("kind", ["mlp", "bank"])
def test_generators_of_one_step_are_refused(kind):
    config = {"mlp": TOY, "bank": GeneratorConfig.bank()}[kind]
    generator = build_generator(config, LAYOUT, CONDITION_DIM)
    with pytest.raises(
        ValueError, match=f"of kind '{kind}'; only a dit .*: mlp and bank already take one step"
    ):
        distilled(generator)


@pytest.mark.parametrize(
    "steps, teacher_steps, message",
    [
        (0, 50, "steps is 0; it must be an integer in 1 to 4"),
        (-1, None, "steps is -1; it must be an integer in 1 to 4"),
        (5, 50, "steps is 5; it must be an integer in 1 to 4"),
        (2, 2, "teacher_steps is 2; it must be a multiple of steps, 2, greater than it"),
        (3, 50, "teacher_steps is 50; it must be a multiple of steps, 3"),
        (2, 0, "teacher_steps is 0; it must be"),
        (4, -8, "teacher_steps is -8; it must be"),
        (1, 1001, "teacher_steps is 1001; it must be .* at most 1000"),
    ],
)
def test_steps_out_of_range_are_refused(steps, teacher_steps, message):
    with pytest.raises(ValueError, match=message):
        distilled(trained(), steps, teacher_steps=teacher_steps)


@pytest.mark.parametrize("steps, expected", [(1, 50), (2, 50), (3, 51), (4, 48)])
def test_the_teacher_takes_some_fifty_steps_unless_told(steps, expected):
    generator = build_generator(TOY_DIT, LAYOUT, CONDITION_DIM)
    _, report = distilled(generator, steps, teacher_steps=None)
    assert report.teacher.num_steps == expected


def test_a_generator_that_was_distilled_teaches_in_its_own_steps_only():
    student, _ = distilled(trained("v"), 2)
    with pytest.raises(
        ValueError,
        match=r"in teacher_steps = 12 the generator answers \d+.0% of the edited queries, but "
        r"100.0% with its own 2 steps of ddim; one that was distilled already can only teach",
    ):
        distilled(student, 1)
    further, report = distilled(student, 1, teacher_steps=2)
    assert report.student.answered == 1.0 and further.config.sampler.num_steps == 1


def test_a_loss_that_becomes_nan_says_what_helps():
    with pytest.raises(FloatingPointError, match="after 20 steps; try a smaller learning_rate"):
        distilled(with_training(trained(), learning_rate=1e30), 1)


# In an edited model


@pytest.fixture(scope="module")
def dit_folder(tmp_path_factory):
    config = dataclasses.replace(CONFIG, generator=GENERATORS["dit"])
    return saved_editor(tmp_path_factory, "dit", config)


@pytest.fixture
def editor(dit_folder):
    return load(dit_folder)


def test_a_distilled_editor_answers_as_before_and_goes_on_as_before(editor, tmp_path):
    others = editor.generate(UNRELATED, MOST)
    config, teacher = editor.config, editor.edits.generator
    wanted = sampled_neurons(teacher, editor.edits.conditions, TEACHER_STEPS)
    report = editor.distill(1, teacher_steps=TEACHER_STEPS, work_folder=tmp_path / "work")
    assert list((tmp_path / "work").iterdir())
    assert report.student.answered == report.teacher.answered == 1.0
    student = editor.edits.generator
    made = student.scaled_weights(student.generate(editor.edits.conditions))
    assert distance(made, wanted) == pytest.approx(report.student.to_teacher, abs=1e-4)
    assert report.student.to_teacher <= CLOSE

    sampler = dataclasses.replace(config.generator.sampler, num_steps=1)
    assert editor.config.generator == dataclasses.replace(config.generator, sampler=sampler)
    assert dataclasses.replace(editor.config, generator=config.generator) == config
    assert editor.evaluate().protocol["sampler"]["num_steps"] == 1
    assert editor.edits.report.seconds.keys() == {
        "collect",
        "encoder",
        "gate",
        "generator",
        "distill",
    }
    assert editor.generate(QUERIES, MOST) == ANSWERS
    assert editor.generate(UNRELATED, MOST) == others

    editor.save_pretrained(tmp_path / "edited")
    loaded = load(tmp_path / "edited")
    assert loaded.config == editor.config
    assert state(loaded) == state(editor)
    loaded.add(FURTHER)
    distilled = loaded.edits.report.seconds["distill"]
    assert loaded.train().answered == 1.0 and loaded.edits.generated.all()
    assert loaded.edits.report.seconds["distill"] == distilled > 0
    assert loaded.config.generator.sampler.num_steps == 1
    further = [fact.query for fact in FURTHER]
    answers = ANSWERS + [fact.answer for fact in FURTHER]
    assert loaded.generate(QUERIES + further, MOST) == answers


def test_seconds_of_a_distillation_are_with_those_before_an_interruption(editor, monkeypatch):
    def resumed(*args, **more):
        student, report = distill(*args, **more)
        return student, dataclasses.replace(report, seconds_before=1000.0)

    monkeypatch.setattr(stages, "distill", resumed)
    editor.distill(1, teacher_steps=TEACHER_STEPS)
    assert editor.edits.report.seconds["distill"] > 1000


def test_a_failed_distillation_leaves_the_editor_as_it_was(editor, monkeypatch):
    before, config = state(editor), editor.config
    monkeypatch.setattr(distilling, "fit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        editor.distill(1, teacher_steps=TEACHER_STEPS)
    with pytest.raises(ValueError, match="steps is 9; it must be an integer in 1 to 4"):
        editor.distill(9)
    assert state(editor) == before and editor.config == config


def test_nothing_edited_cannot_be_distilled():
    with pytest.raises(RuntimeError, match="nothing is edited yet"):
        make_editor().distill(1)
