"""Tests reading the traffic of a compiled program from its text."""

import jax
import jax.numpy as jnp
import pytest

from scripts.benchmarks import hlo_cost

TEXT = """HloModule jit_step

%inside (p0: f32[3,4], p1: s32[]) -> f32[1,4] {
  %p0 = f32[3,4]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %part = f32[1,4]{1,0} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,4}
}

%together (q: f32[1,4]) -> f32[2,4] {
  %q = f32[1,4]{1,0} parameter(0)
  ROOT %g = f32[2,4]{1,0} all-gather(%q), dimensions={0}
}

%body (b: (s32[], f32[3,4], f32[1,4])) -> (s32[], f32[3,4], f32[1,4]) {
  %b = (s32[], f32[3,4], f32[1,4]) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %w = f32[3,4]{1,0} get-tuple-element(%b), index=1
  %slice = f32[1,4]{1,0} fusion(%w, %i), kind=kLoop, calls=%inside
  %all = f32[2,4]{1,0} fusion(%slice), kind=kCustom, calls=%together
  %sum = f32[1,4]{1,0} all-reduce(%slice), replica_groups={}, to_apply=%add
  ROOT %t = (s32[], f32[3,4], f32[1,4]) tuple(%i, %w, %sum)
}

%condition (c: (s32[], f32[3,4], f32[1,4])) -> pred[] {
  %c = (s32[], f32[3,4], f32[1,4]) parameter(0)
  %j = s32[] get-tuple-element(%c), index=0
  %n = s32[] constant(3)
  ROOT %lt = pred[] compare(%j, %n), direction=LT
}

ENTRY %main (x: (s32[], f32[3,4], f32[1,4]), y: bf16[8]) -> bf16[8] {
  %x = (s32[], f32[3,4], f32[1,4]) parameter(0)
  %y = bf16[8]{0} parameter(1)
  %loop = (s32[], f32[3,4], f32[1,4]) while(%x), condition=%condition, body=%body
  %fast = bf16[8]{0:T(8)S(1)} copy(%y)
  ROOT %r = bf16[8]{0} all-reduce(%fast), replica_groups={}, to_apply=%add
}
"""


def test_loops_count_as_often_as_they_run():
    program = hlo_cost.HloProgram(TEXT)
    assert program.collectives() == [
        hlo_cost.Collective("all-gather", "f32", times=3, bytes=96),
        hlo_cost.Collective("all-reduce", "bf16", times=1, bytes=16),
        hlo_cost.Collective("all-reduce", "f32", times=3, bytes=48),
    ]


def test_bytes_accessed():
    # Each of 3 rounds: 16 bytes of the slice, 4 of the index and 16 written; 16 + 16 in the
    # all-reduce; 16 read and 32 written by the fusion that gathers.
    # Outside: 16 read by the copy, whose result is in VMEM; 16 written by the all-reduce.
    assert hlo_cost.HloProgram(TEXT).bytes_accessed() == 3 * (16 + 4 + 16 + 32 + 48) + 16 + 16
    assert (
        hlo_cost.HloProgram(TEXT.replace("constant(3)", "constant(1)")).bytes_accessed() == 116 + 32
    )
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo_cost.HloProgram("HloModule x")


FUSED = """HloModule jit_step

%deepest (d0: f32[5,8], d1: s32[]) -> f32[1,8] {
  %d0 = f32[5,8]{1,0} parameter(0)
  %d1 = s32[] parameter(1)
  %same = f32[5,8]{1,0} bitcast(%d0)
  ROOT %part = f32[1,8]{1,0} dynamic-slice(%same, %d1, %d1), dynamic_slice_sizes={1,8}
}

%inside (p0: f32[5,8], p1: s32[], p2: f32[5,8]) -> f32[5,8] {
  %p0 = f32[5,8]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[5,8]{1,0} parameter(2)
  %row = f32[1,8]{1,0} fusion(%p0, %p1), kind=kLoop, calls=%deepest
  ROOT %kept = f32[5,8]{1,0} dynamic-update-slice(%p2, %row, %p1, %p1)
}

ENTRY %main (x: f32[5,8], i: s32[]) -> f32[5,8] {
  %x = f32[5,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %room = f32[5,8]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %y = f32[5,8]{1,0} fusion(%x, %i, %room), calls=%inside, c={"estimated_cycles":"70"}
}
"""


def test_bytes_of_fusions_in_fusions():
    """Check that one row of 32 bytes is read, one is written, and the index has 4 bytes."""
    assert hlo_cost.HloProgram(FUSED).bytes_accessed() == 32 + 32 + 4
    whole = FUSED.replace(
        "ROOT %part = f32[1,8]{1,0} dynamic-slice(", "ROOT %part = f32[1,8] sort("
    )
    assert hlo_cost.HloProgram(whole).bytes_accessed() == 160 + 32 + 4
    other = FUSED.replace("AllocateBuffer", "Other")
    assert hlo_cost.HloProgram(other).bytes_accessed() == 32 + 32 + 4 + 160


def test_cycles():
    assert hlo_cost.HloProgram(FUSED).cycles() == 70
    assert hlo_cost.HloProgram(TEXT).cycles() == 0


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[64,197]{1,0}", 4 * 64 * 197),
        ("f32[64,197]{1,0:T(8,128)}", 4 * 64 * 256),
        ("f32[3,197,64]{1,2,0:T(8,128)}", 4 * 3 * 64 * 256),
        ("f32[3,197,64]{2,1,0:T(8,128)}", 4 * 3 * 200 * 128),
        ("bf16[768]{0:T(1024)(128)(2,1)}", 2 * 1024),
        ("f32[]{:T(128)}", 4),
        ("(f32[8]{0}, f32[64,197]{1,0:T(8,128)S(1)})", 32),
    ],
)
def test_arrays_fill_whole_tiles(shape, size):
    assert hlo_cost.shape_bytes(shape) == size


def test_bytes_are_close_to_the_compilers_without_loops():
    """Check the bytes against XLA's cost analysis, which counts a loop's body once."""

    def step(w, x):
        for i in range(3):
            x = jnp.tanh(x @ w[i])
        return x.sum(axis=0)

    def looped(w, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0].sum(axis=0)

    arguments = jnp.ones((3, 256, 256)), jnp.ones((64, 256))
    counts = []
    for function in (step, looped):
        compiled = jax.jit(function).lower(*arguments).compile()
        ours = hlo_cost.HloProgram(compiled.as_text()).bytes_accessed()
        counts.append((ours, compiled.cost_analysis()["bytes accessed"]))
    (ours, theirs), (loop_ours, loop_theirs) = counts
    assert ours == pytest.approx(theirs, rel=0.25)
    assert loop_ours == pytest.approx(ours, rel=0.4)
    assert loop_theirs < 0.6 * loop_ours
