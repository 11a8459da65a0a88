"""The CUDA executor: the interior-point method as one kernel for a batch of dense problems in dual form.

The kernels are text (``cuda/``) that NVRTC compiles at run time, once for each kernel, dtype and kind of device: the
code is kept on disk (`code_cache`). A problem is solved by one block, or one warp of it where it is small, with
everything it iterates on in shared memory; the matrices of a large one lie in global memory, and so in the cache.
Nothing waits for the device but the reading of how many instances are left unsolved.
"""

from __future__ import annotations

import importlib.util
import warnings
from abc import ABC, abstractmethod
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt.errors import CompiledExecutorWarning
from diffopt.linalg.matrices import Dense
from diffopt.packed import Arrangement, Packed
from diffopt.solvers import code_cache
from diffopt.solvers.executor import Answer, Data, Executor, Point
from diffopt.solvers.settings import Settings
from diffopt.warm_start import Start

SOURCES = Path(__file__).parent / "cuda"

WIDEST = 1.9
"""Rows per variable up to which the dual form needs fewer operations than others; as in ``pdipm``."""

WARP_UP_TO = 32
"""Variables up to which a problem is left to one warp: a block would wait for its barriers most of the time."""

MATRICES_SHARED = True
"""Whether matrices that fit shared memory are there."""

WARPS = 4
"""Problems of one warp each that share a block, where its shared memory holds so many."""

MOST_THREADS = 256
"""Threads of the largest block; the kernels' launch bounds say the same."""

MOST_REGISTERS, REGISTERS = 128, 65536
"""Registers that a thread may have by the launch bounds, and that a multiprocessor has for all of its blocks."""

RESERVED = 1024
"""Bytes of shared memory that the system takes for each block, from compute capability 8.0 on."""


class Sizes(NamedTuple):
    """Sizes of one problem, and of the memory that the ``.cuh`` files lay out for it."""

    n: int
    p: int
    m: int
    lower: bool
    upper: bool

    @property
    def bounded(self) -> bool:
        return self.lower or self.upper

    @property
    def c(self) -> int:
        """Directions of inequalities: rows of G, and one for each variable where there are bounds."""
        return self.m + self.n * self.bounded

    @property
    def all(self) -> int:
        """Directions: equalities too."""
        return self.p + self.c

    @property
    def _columns(self) -> int:
        return self.n * (self.all | 1)

    @property
    def _eliminated(self) -> int:
        return self.p * self.all - self.p * (self.p - 1) // 2

    @property
    def _kkt(self) -> int:
        return 7 * self.n + 5 * self.p + 3 * self.c + 2 * self.m + 2 * self.all

    def forward(self, threads: int, large: bool = False) -> int:
        """Return the doubles of shared memory of a team that solves; without the matrices if ``large``."""
        n, p, m, c = self.n, self.p, self.m, self.c
        regions = max(_triangle(n), _triangle(self.all)) + max(self._columns, _triangle(c) + _triangle(n))
        rows = m + n * self.lower + n * self.upper
        return (
            (0 if large else regions)
            + self._kkt
            + 3 * n
            + 3 * p
            + m
            + 7 * c
            + 6 * rows
            + (5 * c + 1) // 2
            + threads
            + 1
        )

    def backward(self, threads: int, large: bool = False) -> int:
        """Return those of a team that differentiates."""
        n, p, m, c = self.n, self.p, self.m, self.c
        factors = _triangle(n) + self._eliminated + _triangle(c)
        return (0 if large else factors) + self._kkt + 3 * n + 2 * p + 2 * m + 2 * c + threads + 1

    def kept(self) -> int:
        """Return the doubles of global memory that an instance keeps."""
        n, p, m = self.n, self.p, self.m
        return _triangle(n) + self._columns + self._eliminated + _triangle(self.c) + 2 * n + 2 * p + 2 * m + 1

    def workspace(self) -> int:
        """Return the doubles of global memory that a team of the large variant works on."""
        return _triangle(self.all)


def _triangle(k: int) -> int:
    return k * (k + 1) // 2


class Shape(NamedTuple):
    """How a kernel is launched: its variant, threads of a block, problems of a block, shared doubles of a problem."""

    variant: str
    threads: int
    problems: int
    words: int

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        return 8 * self.words * self.problems


class Launcher(ABC):
    """Who compiles and launches the kernels: CUDA, or in tests a host compiler's version of them."""

    device_type = "cuda"
    warp = 32

    @abstractmethod
    def missing(self) -> str | None:
        """Return what is missing to use it at all, or ``None``."""

    @abstractmethod
    def shared_bytes(self, device: torch.device) -> int:
        """Return the most shared memory that a block can have."""

    @abstractmethod
    def at_a_time(self, device: torch.device, shape: Shape) -> int:
        """Return about how many blocks run at a time: more would wait, and need memory meanwhile."""

    @abstractmethod
    def launch(
        self, kernel: str, like: Tensor, grid: int, threads: int, shared: int, arguments: list[int | float]
    ) -> None:
        """Launch a kernel for the dtype, and on the device and current stream, of ``like``.

        Args:
            shared: bytes of dynamic shared memory.
            arguments: of 8 bytes each, in the order of ``problem.cuh``.
        """


class CudaLauncher(Launcher):
    """Compiles with NVRTC and launches on torch's current stream, through ``cuda.core``."""

    def __init__(self) -> None:
        self._kernels: dict[tuple[str, torch.dtype, int], Any] = {}

    def missing(self) -> str | None:
        """See `Launcher`."""
        if torch.version.hip is not None:
            return "needs CUDA, and this torch is for ROCm"
        try:
            found = importlib.util.find_spec("cuda.core") is not None
        except ModuleNotFoundError:
            found = False
        if found:
            return None
        major = (torch.version.cuda or "13").split(".")[0]
        return f"needs the package cuda.core: pip install 'diffopt-torch[cuda{major}]'"

    def shared_bytes(self, device: torch.device) -> int:  # pragma: cuda
        """See `Launcher`."""
        return torch.cuda.get_device_properties(device).shared_memory_per_block_optin

    def at_a_time(self, device: torch.device, shape: Shape) -> int:  # pragma: cuda
        """See `Launcher`."""
        found = torch.cuda.get_device_properties(device)
        by_memory = found.shared_memory_per_multiprocessor // (shape.shared + RESERVED)
        by_registers = REGISTERS // (shape.threads * MOST_REGISTERS)
        return found.multi_processor_count * max(1, min(by_memory, by_registers))

    def launch(  # pragma: cuda
        self, kernel: str, like: Tensor, grid: int, threads: int, shared: int, arguments: list[int | float]
    ) -> None:
        """See `Launcher`."""
        from cuda.core import Device, LaunchConfig, Stream, launch  # pyright: ignore[reportMissingImports]

        index = like.device.index
        with torch.cuda.device(index):
            Device(index).set_current()
            compiled = self._kernel(kernel, like.dtype, index)
            stream = Stream.from_handle(torch.cuda.current_stream(index).cuda_stream)
            launch(stream, LaunchConfig(grid=grid, block=threads, shmem_size=shared), compiled, *arguments)

    def _kernel(self, name: str, dtype: torch.dtype, index: int) -> Any:  # pragma: cuda
        from cuda.bindings import driver  # pyright: ignore[reportMissingImports]
        from cuda.core import Device, ObjectCode  # pyright: ignore[reportMissingImports]

        key = (name, dtype, index)
        if key not in self._kernels:
            code = compiled(name, dtype, f"sm_{''.join(map(str, torch.cuda.get_device_capability(index)))}")
            kernel = ObjectCode.from_cubin(code).get_kernel(name)
            # More than 48 KB of dynamic shared memory has to be asked for.
            wanted = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            most = self.shared_bytes(torch.device("cuda", index))
            owner = driver.CUdevice(Device(index).device_id)
            (error,) = driver.cuKernelSetAttribute(wanted, most, kernel.handle, owner)
            if error != driver.CUresult.CUDA_SUCCESS:
                raise RuntimeError(f"The driver refused {most} bytes of shared memory for {name}: {error.name}.")
            self._kernels[key] = kernel
        return self._kernels[key]


KERNELS = tuple(f"diffopt_{what}_{variant}" for what in ("solve", "pullback") for variant in ("block", "warp", "large"))
"""In the order of the bits of ``DIFFOPT_ONLY``."""


@cache
def compiled(name: str, dtype: torch.dtype, architecture: str) -> bytes:
    """Return a kernel's machine code: kept from before, or by NVRTC, which takes many seconds. Needs no device."""
    macros = {
        "DIFFOPT_REAL": "float" if dtype == torch.float32 else "double",
        "DIFFOPT_ONLY": str(1 << KERNELS.index(name)),
    }
    said = [_compiler_version(), architecture, STANDARD, *(f"{macro}={value}" for macro, value in macros.items())]
    files = sorted(SOURCES.glob("*.cu*"))
    key = [
        *(text.encode() for text in said),
        *(part for file in files for part in (file.name.encode(), file.read_bytes())),
    ]
    return code_cache.get(key, lambda: _compile(architecture, macros))


STANDARD = "c++17"


def _compiler_version() -> str:
    from cuda.bindings import nvrtc  # pyright: ignore[reportMissingImports]

    _, major, minor = nvrtc.nvrtcVersion()
    return f"NVRTC {major}.{minor}"


def _compile(architecture: str, macros: dict[str, str]) -> bytes:
    from cuda.core import Program, ProgramOptions  # pyright: ignore[reportMissingImports]

    options = ProgramOptions(
        std=STANDARD, arch=architecture, include_path=str(SOURCES), define_macro=list(macros.items())
    )
    return bytes(Program((SOURCES / "kernels.cu").read_text(), "c++", options).compile("cubin").code)


class Saved(NamedTuple):
    """What a solve keeps for its pullback: its records, the data as they were passed, and whether what it left unsolved
    has others to differentiate it."""

    kept: Tensor
    lists: Tensor
    sizes: Sizes
    fields: dict[str, _Field]
    others: bool


class CudaExecutor(Executor):
    """See the module.

    Args:
        launcher: see `Launcher`.
    """

    def __init__(self, launcher: Launcher | None = None) -> None:
        self.launcher = CudaLauncher() if launcher is None else launcher

    def refuses(self, data: Data, settings: Settings) -> str | None:
        """See `Executor`."""
        device = data.q.device
        if device.type != self.launcher.device_type:
            return f"runs on CUDA devices, the data is on {device.type}"
        if not isinstance(data.Q, Dense):
            return f"takes a dense Q, not {type(data.Q).__name__}"
        sizes = _sizes(data)
        rows = sizes.m + (sizes.n if sizes.bounded else 0)
        if rows > WIDEST * sizes.n:
            return f"takes up to {WIDEST} constraints for each variable, not {rows} for {sizes.n}"
        if settings.reduction not in ("auto", "dual"):
            return f"works in the dual form, not {settings.reduction!r}"
        if not settings.polish:
            return "always polishes"
        missing = self.launcher.missing()
        if missing is not None:
            return missing
        limit = self.launcher.shared_bytes(device)
        for backward in (False, True):
            needed = self._shape(sizes, device, backward).shared
            if needed > limit:
                return f"needs {needed} bytes of shared memory for a problem of this size, the device has {limit}"
        return None

    def solve(
        self,
        data: Data,
        settings: Settings,
        tolerance: float,
        weak_tolerance: float,
        keep: bool,
        start: Start | None = None,
    ) -> Answer:
        """See `Executor`. A start is left unused."""
        sizes, batch, q = _sizes(data), data.batch, data.q
        count = batch.numel()
        fields = _fields(data)
        packed = Packed.empty(Arrangement(batch, sizes.n, sizes.p, sizes.m), q)
        x, s, nu, lam, lower, upper, residuals, counts, status = packed.places()
        unsolved = torch.zeros(1, dtype=torch.int32, device=q.device)
        shape = self._shape(sizes, q.device, backward=False)
        # Without a pullback, and for the workspace, memory is needed for as many problems as run at a time only.
        large = shape.variant == "large"
        grid = -(-count // shape.problems)
        if large or not keep:
            grid = min(grid, self.launcher.at_a_time(q.device, shape))
        teams = grid * shape.problems
        records = count if keep else teams
        kept = torch.empty(records * sizes.kept(), dtype=torch.float64, device=q.device)
        lists = torch.empty(records * (sizes.c + 1), dtype=torch.int32, device=q.device)
        workspace = kept.new_empty(teams * sizes.workspace()) if large else None
        if count:
            pairs = [v for name in ("Q", "q", "A", "b", "G", "h", "lower", "upper") for v in fields[name].pair()]
            arguments: list[int | float] = [*pairs, sizes.n, sizes.p, sizes.m, count, kept.data_ptr(), lists.data_ptr()]
            arguments += [int(keep), _pointer(workspace), x, s, lam, nu, lower, upper, status, counts, residuals]
            claim = settings.tolerance_for(q.dtype)
            arguments += [unsolved.data_ptr(), settings.max_iterations, float(tolerance), float(claim)]
            arguments += [float(weak_tolerance)]
            self._launch("solve", q, grid, shape, arguments)
        saved = Saved(kept, lists, sizes, fields, others=settings.sync) if keep else None
        left = int(unsolved.item()) if settings.sync else None
        name = f"cuda:{shape.variant}"
        return Answer(packed, left, None, saved, name)

    def pullback(
        self, data: Data, saved: Saved, point: Point, gradients: tuple[Tensor | None, ...], needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """See `Executor`."""
        sizes, fields = saved.sizes, saved.fields
        n, p, m = sizes.n, sizes.p, sizes.m
        batch, q = data.batch, data.q
        count = batch.numel()
        names = ("Q", "q", "A", "b", "G", "h", "lower", "upper")
        wanted = dict(zip(names, needed, strict=True))
        cores = {"Q": (n, n), "q": (n,), "A": (p, n), "b": (p,), "G": (m, n), "h": (m,), "lower": (n,), "upper": (n,)}
        # A shared matrix collects the outer products of all instances, of which the kernel writes the vectors.
        collected = [name for name in ("Q", "A", "G") if wanted[name] and fields[name].stride == 0]
        found = {
            name: q.new_empty((*batch, *cores[name])) if wanted[name] and name not in collected else None
            for name in names
        }
        vectors = q.new_empty((count, 2 * (n + p + m)), dtype=torch.float64) if collected else None
        if count:
            pairs = [v for name in ("Q", "A", "G", "h") for v in fields[name].pair()]
            for_x, for_s, for_nu, for_lam, *for_bounds = [None if g is None else g.contiguous() for g in gradients]
            tensors = (for_x, for_s, for_lam, for_nu, *for_bounds, *found.values(), vectors)
            arguments: list[int | float] = [*pairs, int(sizes.bounded), n, p, m, count]
            arguments += [saved.kept.data_ptr(), saved.lists.data_ptr(), int(saved.others), *map(_pointer, tensors)]
            shape = self._shape(sizes, q.device, backward=True)
            self._launch("pullback", q, -(-count // shape.problems), shape, arguments)
        if vectors is not None:
            y, y_eq, dh, lam, x, nu = vectors.split((n, p, m, m, n, p), -1)
            sums = {"Q": lambda: -0.5 * (y.mT @ x + x.mT @ y), "A": lambda: -(nu.mT @ y + y_eq.mT @ x)}
            sums["G"] = lambda: -(lam.mT @ y + dh.mT @ x)
            for name in collected:
                found[name] = sums[name]().to(q.dtype)
        return tuple(
            None if gradient is None or tensor is None else gradient.sum_to_size(tensor.shape)
            if gradient.dim() >= tensor.dim() else gradient.expand(tensor.shape)
            for gradient, tensor in zip(found.values(), data.tensors(), strict=True)
        )  # fmt: skip

    def _shape(self, sizes: Sizes, device: torch.device, backward: bool) -> Shape:
        words = sizes.backward if backward else sizes.forward
        warp, limit = self.launcher.warp, self.launcher.shared_bytes(device)
        fit = limit // (8 * words(warp))
        if sizes.n <= WARP_UP_TO and fit:
            problems = min(WARPS, fit)
            return Shape("warp", warp * problems, problems, words(warp))
        threads = MOST_THREADS if max(sizes.n, sizes.all) > 48 else MOST_THREADS // 2
        block = Shape("block", threads, 1, words(threads))
        if block.shared <= limit and MATRICES_SHARED:
            return block
        return Shape("large", threads, 1, words(threads, large=True))

    def _launch(self, name: str, like: Tensor, grid: int, shape: Shape, arguments: list[int | float]) -> None:
        kernel = f"diffopt_{name}_{shape.variant}"
        self.launcher.launch(kernel, like, grid, shape.threads, shape.shared, [*arguments, shape.words])


class _Field(NamedTuple):
    """A tensor of the data as a kernel takes it: contiguous, or absent; numbers between instances, 0 if shared."""

    tensor: Tensor | None
    stride: int

    def pair(self) -> tuple[int, int]:
        return _pointer(self.tensor), self.stride


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _sizes(data: Data) -> Sizes:
    lower, upper = data.lower is not None, data.upper is not None
    return Sizes(data.q.shape[-1], data.A.shape[-2], data.G.shape[-2], lower, upper)


def _fields(data: Data) -> dict[str, _Field]:
    names, dims = ("Q", "q", "A", "b", "G", "h", "lower", "upper"), (2, 1, 2, 1, 2, 1, 1, 1)
    return {name: _field(v, k, data.batch) for name, v, k in zip(names, data.tensors(), dims, strict=True)}


def _field(tensor: Tensor | None, dims: int, batch: torch.Size) -> _Field:
    if tensor is None:
        return _Field(None, 0)
    lead, core = tensor.shape[: tensor.dim() - dims], tensor.shape[tensor.dim() - dims :]
    if lead.numel() == 1 and batch.numel() != 1:
        return _Field(tensor.contiguous(), 0)
    return _Field(tensor.expand(*batch, *core).contiguous(), core.numel())


_executor: CudaExecutor | None = None
_warned = False


def get() -> CudaExecutor:
    """Return the executor; where what it needs is not installed, it refuses everything."""
    global _executor
    if _executor is None:
        _executor = CudaExecutor()
    return _executor


def warn_if_missing() -> None:
    """Say once what is missing, what that costs, and how to get it."""
    global _warned
    reason = get().launcher.missing()
    if reason is not None and not _warned:
        _warned = True
        warnings.warn(
            f"diffopt solves on CUDA devices in torch operations, many times slower: its CUDA executor {reason}",
            CompiledExecutorWarning,
            stacklevel=2,
        )
