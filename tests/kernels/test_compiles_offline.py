"""The kernels compile for sm_80 and sm_90 on a machine that has neither: what the interpreter accepts is not enough.

Runs in a process of its own, since kernels imported for the interpreter cannot be compiled. What Triton's language
refuses, its front end does (to TTIR): all kernels go through that. What a back end makes of them, `make check` sees
for an H100, and the soak for all GPUs.
"""

import json
import sys

import pytest

FRONT_END = """
from triton.backends.amd.compiler import HIPBackend
from triton.backends.nvidia.compiler import CUDABackend

class Enough(Exception):
    pass

def front_end_alone(backend):
    add = backend.add_stages
    def stages_to_ttir(self, stages, *more):
        add(self, stages, *more)
        def enough(*_):
            raise Enough
        stages |= dict.fromkeys([name for name in stages if name != "ttir"], enough)
    backend.add_stages = stages_to_ttir

if FRONT_END_ALONE:
    front_end_alone(CUDABackend)
    front_end_alone(HIPBackend)
"""

COMPILE = """
import json, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastkd.kernels.divergences import divergence_names, find_divergence
from fastkd.kernels.loss import row_passes as sweeps, triton_kernels as lt
from fastkd.kernels.loss.triton_impl import loss_kernel_of

TYPES = {
    "x_ptr": "*{t}", "g_ptr": "*{t}", "labels_ptr": "*i64", "mask_ptr": "*i1", "index_ptr": "*i64", "ids_ptr": "*i32",
    "draws_ptr": "*i32", "outcomes_ptr": "*i32", "x_outer": "i64", "g_outer": "i64", "outer": "i64",
    "covered_ptr": "*i8", "part_ptr": "*i64", "num_items_ptr": "*i64",
}
FLOATS = ("alpha", "T", "reach", "fixed_scale", "inverse_draw_temperature", "parameter", "softcap", "logit_scale")

RUN_TIME = object()
HEAD = {"softcap": RUN_TIME, "logit_scale": RUN_TIME}  # numbers of a model that has them

def compiled(kernel, constants, dtype="bf16", arch=90, **options):
    names = kernel.arg_names
    def type_of(name):
        if name in constants:
            return "constexpr"
        known = TYPES.get(name, "*fp32" if name.endswith("_ptr") else "fp32" if name in FLOATS else "i32")
        return known.format(t=dtype)
    signature = {n: type_of(n) for n in names}
    if triton.__version__ < "3.3":
        known = {n: kind for n, kind in signature.items() if kind != "constexpr"}
        source = ASTSource(fn=kernel, signature=known, constants=constants)
    else:
        keyed = {(names.index(name),): value for name, value in constants.items()}
        source = ASTSource(fn=kernel, signature=signature, constexprs=keyed)
    try:
        built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options or {"num_warps": 8})
    except Enough:
        return 0
    return len(built.asm["cubin"])

def loss(arch, dtype, divergence, treatment, width=128256, **change):
    settings = sweeps.sweep_settings(width, 4 if dtype == "fp32" else 2)
    options = {name: settings.pop(name) for name in ("num_warps", "maxnreg")}
    settings |= {"X_ALIGNED": True, "G_ALIGNED": True}
    c = dict(
        TREATMENT=treatment, BY_POSITION=True, WANT_GRAD=True, softcap=None,
        logit_scale=None, M=4, BLOCK_K=64, BLOCK_M=8, STAGE=0, part_ptr=None, statistics_ptr=None, ranks=1, BLOCK_R=1,
        **settings,
    )
    if treatment != 1:
        c["draws_ptr"] = None
    c = {name: value for name, value in {**c, **change}.items() if value is not RUN_TIME}
    return compiled(loss_kernel_of(find_divergence(divergence)), c, dtype, arch, **options)

sizes = {}
others = sorted({*divergence_names()} - {"forward_kl"})
for arch in (80, 90):
    # what depends on the machine is in the kernel itself: all of that on both, a divergence's own terms on one
    cells = [("forward_kl", treatment) for treatment in (0, 1, 2)] + [(name, 0) for name in others[arch // 90 :: 2]]
    for number, (divergence, treatment) in enumerate(cells):
        dtype = ("bf16", "fp16", "fp32")[number % 3]
        name = f"sm_{arch} {divergence} {treatment} {dtype}"
        sizes[name] = loss(arch, dtype, divergence, treatment, x_stride=1, g_stride=1)
odd = dict(width=50257, G_ALIGNED=False)
sizes["odd, strided, capped, out of place"] = loss(90, "fp32", "forward_kl", 0, **odd, **HEAD)
divided = dict(part_ptr=RUN_TIME, statistics_ptr=RUN_TIME, x_stride=1, g_stride=1)
sizes["divided, own"] = loss(90, "bf16", "forward_kl", 1, STAGE=1, WANT_GRAD=False, g_ptr=None, **divided)
sizes["divided, merged"] = loss(90, "bf16", "forward_kl", 1, STAGE=2, ranks=RUN_TIME, BLOCK_R=8, **divided)
sizes["evaluation, compact, no labels"] = loss(90, "bf16", "forward_kl", 0, WANT_GRAD=False, labels_ptr=None)
sizes["prepare"] = compiled(lt.prepare_kernel, dict(M=4, OFF_GRID=True, SNAP=1e-6, HIGHEST=1e3, BLOCK=4096, BLOCK_M=8))
sizes["prepare, floats"] = compiled(
    lt.prepare_kernel,
    dict(M=4, OFF_GRID=True, SNAP=1e-6, HIGHEST=1e3, BLOCK=4096, BLOCK_M=8, mask_ptr=None, index_ptr=None,
         num_items_ptr=None, upstream_ptr=None, alpha_ptr=None, T_ptr=None),
)
sizes["total"] = compiled(lt.total_kernel, dict(HARD=True, BLOCK=4096))
sizes["zero"] = compiled(sweeps.zero_uncovered_kernel, dict(BLOCK=4096))
sizes["scale"] = compiled(sweeps.scale_kernel, dict(BLOCK=4096))
print(json.dumps(sizes))
"""


WHOLE = pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.soak)])


@pytest.mark.skipif(sys.platform != "linux", reason="triton is built for Linux")
@WHOLE
def test_every_kernel_compiles_without_a_gpu(compiled_kernels, whole: bool) -> None:
    sizes = json.loads(compiled_kernels(f"FRONT_END_ALONE = {not whole}\n" + FRONT_END + COMPILE))
    assert len(sizes) == 19
    assert all((size > 1000) == whole for size in sizes.values())


LAUNCHES = """
import json, torch
from fastkd.bench.cases import GRID
from fastkd.bench.compiled import loss_launch, meta, recorded, target, topk_launches
from fastkd.kernels import TopKConfig
from fastkd.kernels.loss.row_passes import scale_triton_

def launches(arch):
    yield loss_launch(128256, torch.bfloat16, arch)
    if arch == "gfx942":  # NVIDIA's other cells are compiled above
        yield loss_launch(50257, torch.float32, arch, treatment="sampled")
        yield loss_launch(128256, torch.bfloat16, arch, train=False)
    config = TopKConfig(k=48, draws=16, mass=0.95, temperatures=GRID)
    yield from topk_launches(128256, torch.bfloat16, arch, config=config)
    yield from recorded(lambda: scale_triton_(meta(8, 128256), meta()), arch)

for arch in (100, "gfx942"):
    for launch in launches(arch):
        try:
            built = launch.compile(arch)
        except Enough:
            size, warps = 0, launch.options["num_warps"]
        else:
            size, warps = len(built.asm["cubin" if arch == 100 else "hsaco"]), built.metadata.num_warps
        print(json.dumps([launch.name, size, warps * target(arch).warp_size]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="triton is built for Linux")
@WHOLE
def test_what_is_launched_compiles_for_blackwell_and_amd(compiled_kernels, whole: bool) -> None:
    """With the options that the launches themselves choose, which differ between the back ends."""
    code = f"FRONT_END_ALONE = {not whole}\n" + FRONT_END + LAUNCHES
    found = [json.loads(line) for line in compiled_kernels(code).splitlines()]
    names = [name for name, _, _ in found]
    assert all(names.count(name) == 2 for name in ("_scan", "_pick", "_finish", "_weigh", "_draw", "scale_kernel"))
    assert names.count("loss_kernel") == 4
    assert all((size > 1000) == whole and threads <= 1024 for _, size, threads in found)


COUNTS = """
import os
os.environ["TRITON_DISABLE_LINE_INFO"] = "0"  # with which the kernel's number T loses its name
import json, torch
from fastkd.bench.compiled import loss_launch
from fastkd.bench.sass import count_loss

launch = loss_launch(49152, torch.bfloat16, 90)
for temperature in (2.0, 3.3):
    found = count_loss(launch, 90, temperature)
    parts = {name: [part.issued * 32 / 49152, part.exponentials * 32 / 49152] for name, part in found.parts.items()}
    print(json.dumps([found.registers, found.stack, found.bytes / (2 * 2 * 49152), parts]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="triton is built for Linux")
def test_instructions_of_the_loss_are_counted(compiled_kernels) -> None:
    """A logit's exponentials are known: one a pass at T = 2, two at another T. Its instructions cannot be fewer than
    its conversion, maximum, exponent and sums."""
    two, other = (json.loads(line) for line in compiled_kernels(COUNTS).splitlines())
    assert two[:2] == other[:2]  # of one kernel
    assert two[0] <= 128
    assert two[2] == pytest.approx(1.0, abs=0.01)
    for name in ("pass 1", "write"):
        assert two[3][name][1] == pytest.approx(1.0, abs=0.1)
        assert other[3][name][1] == pytest.approx(2.0, abs=0.2)
        assert 4 < two[3][name][0] < other[3][name][0] < 20
    assert 0 < two[3]["rest"][0] < 20
