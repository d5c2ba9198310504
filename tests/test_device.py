"""Devices and dtypes chosen on machines with and without GPUs."""

import pytest
import torch

from cogview import device as module
from cogview.device import choose_placement, cpu_quota, training_dtype, use_local_rank_gpu
from cogview.errors import InputError
from cogview.pipeline.cogview import CogView


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture
def cards(monkeypatch):
    """A function that puts two CUDA cards of a compute capability into this machine."""

    def insert(*capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        # It is also true for GPUs that emulate bfloat16.
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)

    return insert


@pytest.fixture
def apple(no_gpu, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)


@pytest.mark.usefixtures("no_gpu")
def test_choose_placement_uses_the_cpu_without_a_gpu():
    for requested in ("auto", "cpu"):
        placement = choose_placement(requested)
        assert (placement.device, placement.dtype) == (torch.device("cpu"), torch.float32)
    assert str(placement) == "cpu, float32 (no GPU is used)"


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float16"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_choose_placement_selects_the_dtype_of_the_gpu(cards, capability, dtype):
    cards(*capability)
    placement = choose_placement()
    assert (placement.device.type, placement.dtype) == ("cuda", getattr(torch, dtype))
    assert "bfloat16" in placement.reason


@pytest.mark.parametrize(("name", "device"), [("cuda", "cuda"), ("cuda:1", "cuda:1"), ("1", "cuda:1"), ("cpu", "cpu")])
def test_choose_placement_uses_the_requested_device(cards, name, device):
    cards(8, 0)
    assert choose_placement(name).device == torch.device(device)


@pytest.mark.usefixtures("apple")
def test_choose_placement_uses_an_apple_gpu():
    for requested in ("auto", "mps"):
        placement = choose_placement(requested)
        assert (placement.device, placement.dtype) == (torch.device("mps"), torch.float16)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_choose_placement_uses_the_requested_dtype(dtype):
    placement = choose_placement("cpu", dtype)
    assert str(placement) == f"cpu, {dtype} (as requested)"
    assert placement.dtype == getattr(torch, dtype)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "device 'gpu' is unknown; expected auto, cpu, cuda, cuda:N or mps"),
        ("", "device '' is unknown"),
        ("meta", "device 'meta' is unknown"),  # PyTorch knows it, but nothing can be computed there
        ("cuda:x", "device 'cuda:x' is unknown"),
        ("cuda", 'device cuda was requested, but PyTorch finds no CUDA device; use device="cpu"'),
        ("0", "device cuda:0 was requested, but PyTorch finds no CUDA device"),
        ("mps", 'device mps was requested, but this machine has no MPS device; use device="cpu"'),
    ],
)
def test_choose_placement_rejects_unavailable_devices(device, message):
    with pytest.raises(InputError, match=message):
        choose_placement(device)


def test_choose_placement_rejects_a_missing_gpu(cards):
    cards(8, 0)
    with pytest.raises(
        InputError, match="device cuda:2 was requested, but this machine has 2 CUDA devices, numbered from 0"
    ):
        choose_placement("cuda:2")


@pytest.mark.usefixtures("no_gpu")
def test_choose_placement_rejects_an_unknown_dtype():
    with pytest.raises(InputError) as caught:
        choose_placement("cpu", "fp16")
    assert str(caught.value) == ("dtype 'fp16' is unknown; known: auto, float32, bfloat16, float16, int8, int4")


# Quantization


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_choose_placement_computes_quantized_weights_in_bfloat16_on_a_cpu(quantization):
    requested, stored = choose_placement("cpu", quantization), choose_placement("cpu", stored=quantization)
    assert (
        (requested.quantization, requested.dtype)
        == (stored.quantization, stored.dtype)
        == (quantization, torch.bfloat16)
    )
    assert str(requested) == f"cpu, bfloat16 with weights in {quantization} (as requested)"
    assert str(stored) == f"cpu, bfloat16 with weights in {quantization} (as stored)"


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_choose_placement_computes_quantized_weights_in_the_dtype_of_the_gpu(cards, capability, dtype, quantization):
    cards(*capability)
    for placement in (choose_placement("cuda:1", quantization), choose_placement("cuda:1", stored=quantization)):
        assert (placement.device, placement.quantization) == (torch.device("cuda:1"), quantization)
        assert placement.dtype == dtype
    assert choose_placement("cpu", quantization).dtype == torch.bfloat16


@pytest.mark.usefixtures("apple")
def test_choose_placement_computes_quantized_weights_in_float16_on_an_apple_gpu():
    assert choose_placement("mps", "int4").dtype == choose_placement(stored="int8").dtype == torch.float16


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_choose_placement_dequantizes_when_another_dtype_is_requested(dtype):
    placement = choose_placement("cpu", dtype, stored="int8")
    assert (placement.dtype, placement.quantization) == (getattr(torch, dtype), None)
    assert str(placement) == f"cpu, {dtype} (as requested)"


@pytest.mark.usefixtures("no_gpu")
def test_choose_placement_accepts_a_quantization_other_than_the_stored_one():
    """Loading the weights decides whether that is possible."""
    assert choose_placement("cpu", "int4", stored="int8").quantization == "int4"


# --- how much memory there is -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("num_parameters", "expected"),
    [
        (0, "cpu, float32 (no GPU is used)"),
        (10**9, "cpu, float32 (no GPU is used)"),  # half of it, not more
        (10**9 + 1, "cpu, bfloat16 (float32 would take 4.0 GB of 8.0 GB of free memory)"),
        (4 * 10**9, "cpu, bfloat16 (float32 would take 16.0 GB of 8.0 GB of free memory)"),
    ],
)
def test_choose_placement_selects_bfloat16_when_memory_is_scarce(monkeypatch, num_parameters, expected):
    monkeypatch.setattr(module, "available_memory", lambda device: 8 * 10**9)
    assert str(choose_placement(num_parameters=num_parameters)) == expected
    assert choose_placement("cpu", "float32", num_parameters=num_parameters).dtype == torch.float32
    assert choose_placement(stored="int8", num_parameters=num_parameters).quantization == "int8"


def test_choose_placement_ignores_the_memory_of_a_gpu(cards, monkeypatch):
    cards(8, 0)
    monkeypatch.setattr(module, "available_memory", lambda device: 0)
    assert choose_placement("cuda", num_parameters=10**12).reason == "the GPU has bfloat16"


@pytest.mark.usefixtures("no_gpu")
def test_from_pretrained_explains_bfloat16_when_memory_is_scarce(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(module, "available_memory", lambda device: 10**6)
    model = CogView.from_pretrained(tiny_checkpoint)
    assert model.placement.reason == "float32 would take 0.0 GB of 0.0 GB of free memory"
    assert model.transformer.embedding.weight.dtype == torch.bfloat16


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_training_dtype_follows_the_gpu(cards, capability, expected):
    cards(*capability)
    assert training_dtype(torch.device("cuda")) == expected


@pytest.mark.parametrize(
    ("has_onednn", "has_avx512_bf16", "has_amx", "expected"),
    [
        (False, True, True, None),  # a Mac, say, where nothing computes in it
        (True, False, False, None),  # oneDNN would emulate it, several times slower than float32
        (True, True, False, torch.bfloat16),
        (True, False, True, torch.bfloat16),
    ],
)
def test_training_dtype_follows_the_cpu(monkeypatch, has_onednn, has_avx512_bf16, has_amx, expected):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has_onednn)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    assert training_dtype(torch.device("cpu")) == expected


def test_training_dtype_uses_the_requested_precision():
    cpu = torch.device("cpu")
    assert training_dtype(cpu, "float32") is None
    assert training_dtype(cpu, "bfloat16") == torch.bfloat16
    assert training_dtype(cpu, "float16") == torch.float16
    assert training_dtype(torch.device("mps")) is None
    with pytest.raises(InputError, match="precision 'fp8' is unknown; known: auto, float32, bfloat16, float16"):
        training_dtype(cpu, "fp8")


@pytest.mark.parametrize(("local", "chosen"), [("1", [1]), ("5", [1]), (None, [])])
def test_use_local_rank_gpu_selects_a_gpu_per_process(cards, monkeypatch, local, chosen):
    cards(8, 0)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    use_local_rank_gpu()
    assert taken == chosen


def test_use_local_rank_gpu_refuses_what_is_no_number(cards, monkeypatch):
    cards(8, 0)
    monkeypatch.setenv("LOCAL_RANK", "-")
    with pytest.raises(InputError, match="LOCAL_RANK is '-', expected a whole number"):
        use_local_rank_gpu()


# --- peaks of memory ----------------------------------------------------------------------------------------------


def test_peak_process_memory_of_a_gpu_counts_reserved_memory_and_context(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4_000, 10_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3_000)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 3_500)
    assert module.peak_process_memory(torch.device("cuda"), free_before=9_000) == 3_500 + 2_000


def test_peak_memory_of_a_gpu_counts_tensors(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3_000)
    assert module.peak_memory(torch.device("cuda")) == 3_000


def test_peak_memory_of_a_cpu_counts_the_process():
    cpu, held = torch.device("cpu"), torch.ones(25_000_000)
    assert module.peak_memory(cpu) > held.nbytes
    assert module.peak_memory(cpu) == module.peak_process_memory(cpu, free_before=0)


def test_float64_of_a_device_without_float64_is_float32():
    assert module.float64_of(torch.device("cpu")) == torch.float64
    assert module.float64_of(torch.device("mps")) == torch.float32


# Processors


@pytest.fixture
def system(tmp_path):
    """Return a function that writes a file of proc or sys below ``tmp_path``, and gives ``tmp_path``."""

    def write(path, text):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return tmp_path

    return write


def test_cpu_quota_is_the_minimum_of_a_group_and_its_ancestors(system):
    """A container with a quota of 1.5 CPUs on a machine of 64 cores computed on 64 threads."""
    root = system("proc/self/cgroup", "0::/a/b\n")
    assert cpu_quota(root) is None  # without visible files
    system("sys/fs/cgroup/a/b/cpu.max", "max 100000\n")
    assert cpu_quota(root) is None
    system("sys/fs/cgroup/a/cpu.max", "400000 100000\n")
    assert cpu_quota(root) == 4
    system("sys/fs/cgroup/cpu.max", "75000 50000\n")  # a namespace shows the container's group as the root
    assert cpu_quota(root) == 1.5


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
def test_cpu_quota_reads_control_groups_of_version_1(mount, system):
    root = system("proc/self/cgroup", "5:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n")
    system(f"sys/fs/cgroup/{mount}/docker/x/cpu.cfs_quota_us", "-1\n")
    system(f"sys/fs/cgroup/{mount}/docker/x/cpu.cfs_period_us", "100000\n")
    assert cpu_quota(root) is None
    system(f"sys/fs/cgroup/{mount}/docker/x/cpu.cfs_quota_us", "250000\n")
    assert cpu_quota(root) == 2.5


@pytest.mark.parametrize("content", ["", "many 100000\n", "100000 0\n", "100000\n"])
def test_cpu_quota_ignores_files_that_it_does_not_know(content, system):
    root = system("proc/self/cgroup", "0::/\n")
    system("sys/fs/cgroup/cpu.max", content)
    assert cpu_quota(root) is None
    assert cpu_quota(root / "nowhere") is None


@pytest.mark.parametrize(("quota", "threads"), [(None, 3), (64.0, 3), (1.5, 2), (0.2, 1)])
def test_choose_placement_lets_threads_follow_the_quota(quota, threads, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(module, "cpu_quota", lambda: quota)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    module.use_cpu_quota.cache_clear()
    try:
        torch.set_num_threads(3)
        choose_placement("cpu")
        assert torch.get_num_threads() == threads
        torch.set_num_threads(5)  # by the caller, afterwards
        choose_placement("cpu")
        assert torch.get_num_threads() == 5
    finally:
        torch.set_num_threads(before)
        module.use_cpu_quota.cache_clear()


def test_use_cpu_quota_leaves_the_choice_to_omp_num_threads(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(module, "cpu_quota", lambda: 1.0)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    module.use_cpu_quota.cache_clear()
    try:
        torch.set_num_threads(3)
        module.use_cpu_quota()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
        module.use_cpu_quota.cache_clear()


# Memory


def test_available_memory_is_minimum_of_system_limits_and_cgroups(tmp_path, system):
    write = system
    write("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable: 4000 kB\n")
    assert module._available_on_host(tmp_path) == 4000 * 1024
    write("proc/self/status", "VmSize: 5000 kB\nVmData: 1000 kB\n")
    write(
        "proc/self/limits",
        "Max data size   unlimited  unlimited  bytes\nMax address space  unlimited  unlimited  bytes\n",
    )
    assert module._available_on_host(tmp_path) == 4000 * 1024
    write(
        "proc/self/limits",
        "Max data size   4096000  unlimited  bytes\nMax address space  unlimited  unlimited  bytes\n",
    )
    assert module._available_on_host(tmp_path) == 3000 * 1024
    write("proc/self/limits", "Max data size   4096000  unlimited  bytes\nMax address space  7168000  7168000  bytes\n")
    assert module._available_on_host(tmp_path) == 2000 * 1024
    write("proc/self/limits", "Max data size   100  100  bytes\n")
    assert module._available_on_host(tmp_path) == 0  # the process exceeds its limit
    (tmp_path / "proc/self/limits").unlink()
    write("proc/self/cgroup", "5:cpu:/\n4:memory:/a\n0::/a/b\n")
    assert module._available_on_host(tmp_path) == 4000 * 1024  # a group without visible files has no limit
    write("sys/fs/cgroup/a/b/memory.max", "max\n")
    write("sys/fs/cgroup/a/memory.max", "2000000\n")
    write("sys/fs/cgroup/a/memory.current", "700000\n")
    write("sys/fs/cgroup/a/memory.stat", "anon 5\ninactive_file 300000\n")
    assert module._available_on_host(tmp_path) == 2000000 - 700000 + 300000
    write("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "900000\n")
    write("sys/fs/cgroup/memory/a/memory.usage_in_bytes", "1000000\n")
    write("sys/fs/cgroup/memory/a/memory.stat", "inactive_file 5\ntotal_inactive_file 200000\n")
    assert module._available_on_host(tmp_path) == 100000


def test_available_memory_is_physical_memory_when_system_reports_none(tmp_path):
    everything = module._available_on_host(tmp_path / "no-such-root")
    assert everything >= module.available_memory(torch.device("cpu"))
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\n")
    assert module._available_on_host(tmp_path) == everything
