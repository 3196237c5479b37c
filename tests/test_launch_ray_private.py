"""Ray's private modules are used in one file, and the installed Ray still has there what that file relies on."""

from __future__ import annotations

import ast
import inspect
from types import SimpleNamespace

from ray._private.label_utils import validate_label_selector
from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator
from ray.train import ControllerError, RunConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.context import TrainContext
from ray.train.v2._internal.execution.controller import controller
from ray.train.v2._internal.execution.controller.state import ResizingState, RestartingState, RunningState
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision
from ray.train.v2._internal.execution.worker_group import WorkerGroup, WorkerGroupState

from minilm.orchestrator.launch import ray_private
from minilm.orchestrator.launch.train_callbacks import StageCallback
from tests.rooms import PACKAGES, ROOT, modules


def test_one_file_uses_private_modules_of_ray():
    found = set()
    for path in (path for package in PACKAGES for path in modules(package)):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            )
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names]
            parts = [name.split(".") for name in names if name.split(".")[0] == "ray"]
            if any(part.startswith("_") or part == "v2" for name in parts for part in name):
                found.add(str(path.relative_to(ROOT)))
    assert found == {"orchestrator/launch/ray_private.py"}


def test_ray_calls_the_callbacks_that_we_define():
    for name, method in vars(StageCallback).items():
        if name.startswith("_"):
            continue
        theirs = getattr(ControllerCallback, name, None) or getattr(WorkerGroupCallback, name, None)
        assert theirs, f"Ray has no {name} any more"
        ours = inspect.signature(method).parameters.values()
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in ours):
            assert len(ours) == len(inspect.signature(theirs).parameters), name


def test_the_controller_resizes_by_the_decision_after_its_callbacks():
    decision = ResizeDecision(3, {"trainer": 1})
    decision.num_workers = 2  # it can be changed
    assert decision.num_workers == 2
    assert "before_controller_execute_resize_decision" in inspect.getsource(controller)


def test_the_state_of_a_resize_is_told_from_a_restart():
    assert ray_private.is_resizing(ResizingState(None))
    assert not ray_private.is_resizing(RestartingState(RuntimeError("dead")))
    assert not ray_private.is_resizing(RunningState())


def test_a_resize_is_delayed_by_the_start_time_of_the_group():
    group = SimpleNamespace(_worker_group_state=WorkerGroupState(1.0, None, [], None))
    group.get_worker_group_state = lambda: group._worker_group_state
    ray_private.delay_resize(group, 25.0)
    assert group.get_worker_group_state().start_time == 26.0
    source = inspect.getsource(WorkerGroup.get_worker_group_state)
    assert "self._worker_group_state" in source


def test_a_function_is_called_on_one_rank():
    assert list(inspect.signature(WorkerGroup.execute_single_async).parameters)[:3] == ["self", "rank", "fn"]


def test_a_train_context_knows_of_drained_nodes(monkeypatch):
    assert "preemption_context" in inspect.signature(TrainContext).parameters
    for info, drained in ((None, False), (object(), True)):
        context = SimpleNamespace(preemption_context=SimpleNamespace(preemption_info=info))
        monkeypatch.setattr(ray_private, "get_train_context", lambda context=context: context)
        assert ray_private.is_node_drained() is drained


def test_a_driver_that_claims_while_others_look_is_not_taken_for_dead(monkeypatch):
    """Its job is registered before it claims, so that whoever has seen the claim also sees the job."""
    drivers, claims = [], {}

    def look(name, found):
        def looked(*_, **__):
            first = found()
            if not drivers:
                drivers.append({"JobID": "02", "IsDead": False})
                claims[b"02"] = b"{}"
            return first

        monkeypatch.setattr(*name, looked)

    look((ray_private, "jobs"), lambda: [*drivers])
    look((ray_private.internal_kv, "_internal_kv_list"), lambda: [*claims])
    monkeypatch.setattr(ray_private.internal_kv, "_internal_kv_get", lambda key, **_: claims.get(key))
    monkeypatch.setattr(ray_private.internal_kv, "_internal_kv_del", lambda key, **_: claims.pop(key))
    ray_private.read_claims()
    assert ray_private.read_claims() == {"02": "{}"}
    drivers[0]["IsDead"] = True
    assert ray_private.read_claims() == {} == claims


def test_a_selector_excludes_nodes():
    selector = ray_private.excluding(["a1", "b2"])
    assert selector == {"ray.io/node-id": "!in(a1,b2)"}
    assert validate_label_selector(selector) is None
    assert ray_private.excluding([]) is None


def test_the_cause_of_a_workers_error_is_found():
    cause = OSError("Read-only file system")
    assert ray_private.cause_of(UserExceptionWithTraceback(cause, "")) is cause
    assert ray_private.cause_of(WorkerHealthCheckFailedError("unhealthy", cause)) is cause
    assert ray_private.cause_of(cause) is cause
    assert ControllerError(cause).controller_failure is cause


def test_a_trainer_names_its_reservation(tmp_path):
    trainer = TorchTrainer(print, run_config=RunConfig(name="a", storage_path=str(tmp_path)))
    assert ray_private.requester_of(trainer) == f"train-{trainer.train_run_context.run_id}"


def test_a_reservation_is_cancelled_by_its_requester(monkeypatch):
    """On a real cluster in test_elastic; here that the call is there, and what it takes."""
    actor = default_autoscaling_coordinator._AutoscalingCoordinatorActor
    assert "requester_id" in inspect.signature(actor.cancel_request).parameters
    assert default_autoscaling_coordinator.get_or_create_autoscaling_coordinator
