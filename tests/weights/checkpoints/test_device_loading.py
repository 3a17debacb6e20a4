"""Loading to a device, with a fake one that copies as late as it may."""

from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from tests.engine.executors.cuda.fake_device import FakeDevice
from weights.checkpoints import model_weights, table_loading, tensor_files
from weights.checkpoints.device_loading import DeviceLoader, copy_part
from weights.checkpoints.table_files import requested_layout
from weights.checkpoints.tensor_files import list_file
from weights.errors import CheckpointError

CPU = torch.device("cpu")
SHAPES = {"row": (1, 500), "rows": (30, 7), "vector": (101,), "scalar": (), "nothing": (0, 3)}


@pytest.fixture
def tensors():
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


@pytest.fixture
def stored(tensors, tmp_path, monkeypatch):
    """The tensors in a file, which is read in parts of 64 values."""
    monkeypatch.setattr(tensor_files, "PART_BYTES", 256)
    save_file(tensors, tmp_path / "model.safetensors")
    return {one.name: one for one in list_file(tmp_path / "model.safetensors")}


class LateCopies:
    """Copies of a fake device; notes the dtype and address of each part."""

    def __init__(self) -> None:
        self.device = FakeDevice()
        self.parts = []

    def __call__(self, part, target):
        self.parts.append((part.dtype, part.data_ptr()))
        self.device.queue(lambda: copy_part(part, target))
        return self.device.record().wait


def loaded(stored, dtype, copies):
    loader = DeviceLoader(CPU, copies)
    found = {name: loader.load(one, dtype) for name, one in stored.items()}
    loader.finish()
    return found


def is_right(found, tensors):
    return all(torch.equal(found[name], one.to(found[name].dtype)) for name, one in tensors.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_buffers_take_turns_and_the_device_converts_their_parts(stored, tensors, dtype):
    copies = LateCopies()
    found = loaded(stored, dtype, copies)
    assert is_right(found, tensors) and {one.dtype for one in found.values()} == {dtype}
    dtypes, addresses = zip(*copies.parts, strict=True)
    # 500, 210, 101 and 1 values
    assert len(copies.parts) == 8 + 4 + 2 + 1 and set(dtypes) == {torch.float32}
    assert len(set(addresses)) == 2 and addresses[:-2] == addresses[2:]


def test_every_wait_is_needed(stored, tensors):
    copies = LateCopies()
    loaded(stored, torch.float32, copies)
    # the first two parts find both buffers free; the last wait is that for all copies
    assert copies.device.num_waits == len(copies.parts) - 2 + 1
    for ignored in range(copies.device.num_waits):
        copies = LateCopies()
        copies.device.ignored_wait = ignored
        assert not is_right(loaded(stored, torch.float32, copies), tensors)


def test_a_part_is_read_while_the_device_copies_the_last_one(stored):
    copies, in_flight = LateCopies(), []
    loader = DeviceLoader(CPU, copies)
    loader.load(stored["row"], torch.float32, lambda num_bytes: in_flight.append(num_bytes))
    assert sum(in_flight) == stored["row"].num_bytes
    # 8 parts, the last two of which no later part had to wait for
    assert copies.device.num_waits == 6


def test_weights_and_tables_are_loaded_when_their_functions_return(stored, tensors, monkeypatch):
    for module in (model_weights, table_loading):
        late = partial(DeviceLoader, start=LateCopies())
        monkeypatch.setattr(module, "DeviceLoader", late)
    assert is_right(model_weights.device_weights(stored, torch.bfloat16, CPU, {}), tensors)
    layout = requested_layout(stored["rows"], "float16")
    rows = table_loading.rows_on_device(stored["rows"], layout, CPU, int, verify=False)
    assert torch.equal(rows, tensors["rows"].half())


def test_buffers_are_page_locked_for_a_gpu(monkeypatch):
    asked, plain = [], torch.empty

    def allocated(*arguments, pin_memory, **options):
        asked.append(pin_memory)
        return plain(*arguments, **options)

    monkeypatch.setattr(torch, "empty", allocated)
    DeviceLoader(torch.device("cuda", 0))
    DeviceLoader(CPU)
    assert asked == [True, True, False, False]


def test_a_truncated_file_is_an_error(stored):
    file = stored["row"].file
    file.write_bytes(file.read_bytes()[: stored["row"].offset + 300])
    with pytest.raises(CheckpointError, match="ends within tensor row"):
        DeviceLoader(CPU).load(stored["row"], torch.float32)
