"""Teacher, students and objective: a teacher that never changes, students that do not notice each other."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModel

from minilm.model.distiller import Distiller
from minilm.model.encoder.build import build_student
from minilm.model.encoder.tapped_encoder import TappedEncoder
from minilm.model.errors import ModelError
from minilm.model.loss.objective import OBJECTIVES, Objective


def config(**changes):
    values = {"vocab_size": 40, "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4}
    return AutoConfig.for_model(
        "bert", **values | {"intermediate_size": 32, "max_position_embeddings": 16} | changes
    )


def teacher(**changes) -> TappedEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TappedEncoder(AutoModel.from_config(config(**changes)), 2)


def student(seed=1, layers=2, hidden=8) -> TappedEncoder:
    return TappedEncoder(build_student(config(), layers=layers, hidden=hidden, seed=seed), layers)


def batch():
    input_ids = torch.randint(2, 40, (3, 10), generator=torch.Generator().manual_seed(5))
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[1, 7:] = False
    return input_ids, mask


def step(distiller, names, seed=11):
    """One pass over the teacher, then each student; gradients by student name."""
    input_ids, mask = batch()
    taps = distiller.teacher_forward(input_ids, mask)
    gradients = {}
    for name in names:
        sums = distiller.term_sums(name, taps, input_ids, mask, dropout_seed=seed)
        (sums.sum() / distiller.count(mask, (3, 10))).backward()
        model = distiller.students[name].model
        gradients[name] = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return gradients


def test_two_students_get_what_each_gets_alone_bit_for_bit():
    objective = Objective.named("minilm")
    alone = {}
    for name, seed, layers in (("a.b", 1, 2), ("c", 2, 1)):
        alone |= step(Distiller(teacher(), {name: student(seed, layers)}, objective), [name])
    pair = Distiller(teacher(), {"a.b": student(1, 2), "c": student(2, 1)}, objective)
    torch.manual_seed(12345)  # dropout must not depend on it
    together = step(pair, ["c", "a.b"])
    for name in ("a.b", "c"):
        assert alone[name].keys() == together[name].keys() and alone[name]
        assert all(torch.equal(alone[name][key], together[name][key]) for key in alone[name])


def test_dropout_depends_on_its_seed_and_leaves_the_global_state_alone():
    distiller = Distiller(teacher(), {"s": student()}, Objective.named("minilm"))
    input_ids, mask = batch()
    taps = distiller.teacher_forward(input_ids, mask)
    before = torch.get_rng_state()
    first, again, other = (
        distiller.term_sums("s", taps, input_ids, mask, dropout_seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_teacher_stays_frozen_out_of_sight_and_in_eval_mode():
    distiller = Distiller(
        teacher(hidden_dropout_prob=0.5).train(), {"s": student()}, Objective.named("minilm")
    )
    distiller.train()
    assert not any(module.training for module in distiller.teacher.modules())
    assert distiller.students["s"].training
    input_ids, mask = batch()
    assert torch.equal(
        distiller.teacher_forward(input_ids, mask).taps.q, distiller.teacher_forward(input_ids, mask).taps.q
    )
    own = {id(p) for p in distiller.students["s"].parameters()}
    assert {id(p) for p in distiller.parameters()} == own
    assert len(distiller.state_dict()) == len(distiller.students["s"].state_dict())
    before = [p.clone() for p in distiller.teacher.parameters()]
    step(distiller, ["s"])
    torch.optim.SGD(distiller.parameters(), lr=1.0).step()
    for parameter, old in zip(distiller.teacher.parameters(), before, strict=True):
        assert parameter.grad is None and not parameter.requires_grad and torch.equal(parameter, old)


def test_a_teacher_in_train_mode_would_be_another_teacher():
    wrong = teacher(hidden_dropout_prob=0.5).train()
    input_ids, mask = batch()
    assert not torch.equal(wrong(input_ids, mask).q, wrong(input_ids, mask).q)


def test_it_moves_the_teacher_along():
    distiller = Distiller(teacher(), {"s": student()}, Objective.named("minilm")).to(torch.float64)
    assert {p.dtype for p in distiller.teacher.parameters()} == {torch.float64}
    sums = distiller.term_sums("s", distiller.teacher_forward(*batch()), *batch())
    assert sums.dtype == torch.float64


def test_the_students_first_layer_is_not_the_tap():
    """A known defect: a tap on the first layer trains one layer only, and gives other numbers."""
    deep = student(layers=2)
    first = TappedEncoder(deep.model, 1)
    input_ids, mask = batch()
    deep.eval()
    assert not torch.allclose(first(input_ids, mask).q, deep(input_ids, mask).q)
    assert len(first.trained_parameters()) < len(deep.trained_parameters())


def test_sgd_lowers_the_divergence_to_a_fraction():
    distiller = Distiller(teacher(), {"s": student(hidden=16)}, Objective.named("minilm"))
    distiller.students["s"].eval()
    with torch.no_grad():  # an initialised teacher's relations are all but uniform
        for parameter in distiller.teacher.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
    optimizer = torch.optim.Adam(distiller.students["s"].trained_parameters().values(), lr=3e-3)
    input_ids, mask = batch()
    taps = distiller.teacher_forward(input_ids, mask)
    losses = []
    for _ in range(60):
        loss = distiller.term_sums("s", taps, input_ids, mask).sum() / distiller.count(mask, (3, 10))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Distiller(teacher(vocab_size=41), {"s": student()}, Objective.named("minilm")),
            "student 's' has a vocabulary of 40 and the teacher of 41; both must read the same tokens",
        ),
        (
            lambda: Distiller(teacher(num_attention_heads=8), {"s": student()}, Objective.named("minilm")),
            "student 's': the teacher has 8 heads and the student 4; give both the same number,"
            " or set relation_heads to divide 16 and 8",
        ),
        (
            lambda: Distiller(teacher(), {}, Objective.named("minilm")),
            "a distiller needs at least one student",
        ),
    ],
)
def test_pairs_that_do_not_fit(make, message):
    with pytest.raises(ModelError) as caught:
        make()
    assert str(caught.value) == message


def test_a_student_that_is_the_teacher():
    same = teacher()
    with pytest.raises(
        ModelError, match=r"^student 's' is the teacher itself; load or build a model of its own$"
    ):
        Distiller(same, {"s": TappedEncoder(same.model, 1)}, Objective.named("minilm"))


@pytest.mark.parametrize(
    "name", sorted(OBJECTIVES.keys() - {"soft-label-mlm", "embedding"})
)  # see test_model_soft_labels.py and test_model_embedding.py
def test_every_objective_trains_exactly_what_it_names(name):
    """The same loop for all of them; two students of unequal depth share the teacher pass."""
    students = {"deep": student(1, layers=2), "flat": student(2, layers=1)}
    alone = Distiller(teacher(), {"flat": student(2, layers=1)}, Objective.named(name))
    distiller = Distiller(teacher(), students, Objective.named(name))
    together = step(distiller, ["deep", "flat"])
    single = step(alone, ["flat"])
    assert all(torch.equal(together["flat"][key], single["flat"][key]) for key in single["flat"])
    for which in students:
        trained = distiller.trained_parameters(which)
        assert trained and all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
        assert set(together[which]) == {key for key in trained if not key.startswith("projection.")}
        state = distiller.state_module(which).state_dict()
        held = {tensor.data_ptr() for tensor in state.values()}
        assert all(p.data_ptr() in held for p in trained.values())
    assert ("projection.value.weight" in distiller.trained_parameters("deep")) == (name == "value-mse")


@pytest.mark.parametrize("name", sorted(OBJECTIVES.keys() - {"soft-label-mlm", "embedding"}))
def test_every_objective_runs_under_autocast(name):
    """Where q, k and v are bfloat16 and hidden states float32; the result is near the float32 one."""
    distiller = Distiller(teacher(), {"s": student(hidden=12)}, Objective.named(name))
    distiller.students["s"].eval()
    input_ids, mask = batch()
    sums = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            sums.append(distiller.term_sums("s", distiller.teacher_forward(input_ids, mask), input_ids, mask))
    assert sums[1].dtype == torch.float32
    torch.testing.assert_close(sums[1], sums[0], rtol=0.1, atol=1e-4)


def test_layer_to_layer_maps_uniformly():
    big = TappedEncoder(build_student(config(), layers=6, hidden=16, seed=0), 6)
    distiller = Distiller(
        big, {"a": student(layers=2), "b": student(layers=3)}, Objective.named("layer-to-layer")
    )
    input_ids, mask = batch()
    output = distiller.teacher_forward(input_ids, mask)
    assert len(output.taps.earlier) == 3  # layers 2 and 4 for three, 3 for two; 6 is the tap
    sums = distiller.term_sums("a", output, input_ids, mask, dropout_seed=1)
    by_hand = distiller.students["a"].eval()(input_ids, mask)
    third = TappedEncoder(big.model, 3)(input_ids, mask)
    expected = [
        Objective.named("minilm").term_sums(t, s, mask)
        for t, s in ((third, by_hand.earlier[0]), (output.taps, by_hand))
    ]
    distiller.students["a"].eval()
    assert sums.requires_grad
    torch.testing.assert_close(distiller.term_sums("a", output, input_ids, mask), sum(expected) / 2)
    with pytest.raises(
        ModelError, match=r"^student 's': it has 3 layers and the teacher 2 up to its tap; layer-to-layer"
    ):
        Distiller(teacher(), {"s": student(layers=3)}, Objective.named("layer-to-layer"))


class Syncs(TorchDispatchMode):
    """Operations that make the host wait for a device: a tensor's value as a number, or a shape that depends on it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(
            name in str(function)
            for name in ("_local_scalar_dense", "nonzero", "masked_select", "equal.default")
        ):
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("implementation", ["reference", "tiled"])
def test_a_step_never_waits_for_the_device(implementation):
    """Without dropout: with it, a CPU step reads one seed, which waits for no device."""
    distiller = Distiller(
        teacher(), {"s": student()}, Objective.named("minilm", implementation=implementation)
    )
    distiller.students["s"].eval()
    with Syncs() as syncs:
        step(distiller, ["s"], seed=None)
    assert syncs.seen == []
    with Syncs() as syncs:
        assert torch.ones(1).item() == 1
    assert syncs.seen == ["aten._local_scalar_dense.default"]
