"""Training runs on the interpreted kernels: losses like the CPU's, in both tiers, and resuming."""

from functools import partial
from types import SimpleNamespace

import pytest

from memory_ops import backends, reference, triton_kernels
from memory_ops.tables import trained_host
from memory_ops.tables.streams import StreamPair
from memory_ops.tables.trained_host import TrainedHostTable
from tests.memory_ops.fake_streams import FakeDevice, HostCaller
from tests.small_runs import check_same, losses, run
from tests.weights.training.conftest import config, texts
from weights.training import run_plan

__all__ = ["config", "texts"]
SMALL = ("data.sequence_length=12", "run.tokens_per_step=24", "run.passes_per_step=2")
HOST = "run.table_tier=host"

pytestmark = pytest.mark.slow


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host tier whose GPU is the CPU: copies run when something waits for them."""

    def host_table(table_RV, device):
        fake = FakeDevice()
        streams = StreamPair(lambda: HostCaller(fake, lambda ready: ready[0]), fake.side)
        return TrainedHostTable(table_RV, device, streams, lambda memory: None)

    monkeypatch.setattr(trained_host, "trained_host_table", host_table)
    monkeypatch.setattr(run_plan, "check_table_tier", lambda *_: None)


@pytest.mark.usefixtures("fake_gpu")
def test_fifty_steps_follow_the_losses_of_the_cpu(config, tmp_path, monkeypatch):
    changes = ("data.sequence_length=8", "run.tokens_per_step=16", "run.steps=50")
    changes += ('model.memory.layers={"1"="memory_plus"}', "run.checkpoint_every=50")
    run(config(*changes), tmp_path / "cpu")
    # top-k kernels, which other tests cover, would take most of the time
    names = {name: getattr(triton_kernels, name) for name in triton_kernels.__all__}
    kernels = SimpleNamespace(**names | {"product_topk": reference.product_topk})
    monkeypatch.setattr(backends, "_for_device_type", lambda device_type: kernels)
    run(config(*changes, HOST, "run.evaluate_every=50"), tmp_path / "host")
    assert len(losses(tmp_path / "host")) == 50
    assert losses(tmp_path / "host") == pytest.approx(losses(tmp_path / "cpu"), abs=1e-3)


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize("change", [(), ("optimizer.row_wise=true",)])
def test_a_run_resumes_bit_for_bit_in_the_other_tier(config, tmp_path, change):
    made = partial(config, *SMALL, *change, "run.steps=4", "run.checkpoint_every=2")
    run(made(), tmp_path / "whole")
    run(made(HOST), tmp_path / "cut", until=2)
    run(made(), tmp_path / "cut", resume=True)
    run(made(), tmp_path / "back", until=2)
    run(made(HOST), tmp_path / "back", resume=True)
    for folder in (tmp_path / "cut", tmp_path / "back"):
        check_same(folder, tmp_path / "whole")
        assert losses(folder) == losses(tmp_path / "whole")


@pytest.mark.usefixtures("fake_gpu")
def test_two_tables_and_recomputed_layers_train_from_host_memory(config, tmp_path):
    peer = 'model.memory.layers={"0"="peer", "1"="memory_plus"}'
    made = partial(config, *SMALL, peer, "run.steps=2")
    run(made(), tmp_path / "device")
    run(made(HOST, "run.checkpoint_activations=true"), tmp_path / "host")
    assert losses(tmp_path / "host") == losses(tmp_path / "device")
    check_same(tmp_path / "host", tmp_path / "device")
