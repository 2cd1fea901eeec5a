"""Samples, counted instructions and bars: what the benchmarks' numbers are made of."""

import time

from experiments.benchmarks import accelerator, timing
from experiments.benchmarks.bars import Bar


def test_what_is_slow_gets_fewer_samples_of_fewer_calls():
    def call():
        time.sleep(0.002)

    effort = timing.Effort(repeats=50, budget=0.02, compiles=1)
    slow, whole = timing.planned(call, effort), timing.planned(call, effort, whole=True)
    assert slow.times == 1 and timing.FEWEST <= slow.number <= 10
    assert whole.times == timing.PERIOD and whole.number == timing.FEWEST
    quick = timing.planned(call, effort._replace(budget=60.0, repeats=2))
    assert (quick.times, quick.number) == (timing.PERIOD, 2)
    seconds = timing.interleaved({"quick": quick, "slow": slow._replace(number=3)})
    assert [len(values) for values in seconds.values()] == [2, 3]
    assert min(map(min, seconds.values())) >= 0.002


def test_bars():
    assert Bar("x", 1.15, 1.15).held and Bar("x", 1.15, 1.15).verdict() == "yes"
    assert Bar("x", 6.0, 6.0, at_least=True).held
    assert Bar("x", 1.38, 1.15).verdict() == "no: 20.0% more"
    assert Bar("x", 4.5, 6.0, at_least=True).verdict() == "no: 25.0% less"
    assert not Bar("x", float("nan"), 6.0).held
    assert not Bar("x", float("nan"), 6.0, at_least=True).held
    missing = Bar("x", None, 1.2, reason="KeyError: 'y'")
    assert not missing.held
    assert list(missing.row().values()) == ["x", "–", "≤ 1.2", "no: KeyError: 'y'"]
    assert list(Bar("x", 7.0, 6.0, at_least=True).row().values()) == ["x", "7.00", "≥ 6", "yes"]


HLO = """HloModule jit_step, entry_computation_layout={(f32[8]{0})->(f32[8]{0})}

%command_buffer.1 (p: f32[8]) -> (f32[8], f32[8]) {
  %p = f32[8]{0} parameter(0)
  %fusion.2 = f32[8]{0} fusion(%p), kind=kLoop, calls=%fused
  %gemm = (f32[8]{0}, s8[4]{0}) custom-call(%p, %p), custom_call_target="__cublas$gemm"
  ROOT %both = (f32[8]{0}, f32[8]{0}) tuple(%fusion.2, %p)
}

ENTRY %main.3 (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %call = (f32[8]{0}, /*index=1*/f32[8]{0}) call(%x), to_apply=%command_buffer.1
  %part = f32[8]{0} get-tuple-element(%call), index=0
  %start = ((f32[8]{0}), f32[8]{0}) copy-start(%part)
  %done = f32[8]{0} copy-done(%start)
  ROOT %last = f32[8]{0} fusion(%done), kind=kLoop, calls=%fused.1, metadata={op_name="{x} = f()"}
}
"""


def test_entry_instructions():
    assert timing.entry_instructions(HLO) == 4  # two in the command buffer, a copy, a fusion


LOOP = """HloModule jit_step

%body (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %potrf = f32[8]{0} custom-call(%p), custom_call_target="cusolver_potrf"
  ROOT %fusion = f32[8]{0} fusion(%potrf), kind=kLoop, calls=%fused
}

%condition (p: f32[8]) -> pred[] {
  %p = f32[8]{0} parameter(0)
  ROOT %less = pred[] fusion(%p), kind=kLoop, calls=%fused.1
}

%short (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8]{0} parameter(0)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %a = f32[8]{0} while(%x), condition=%condition, body=%body, config={"known_trip_count":{"n":"5"}}
  %other = f32[8]{0} while(%a), condition=%condition, body=%body
  ROOT %last = f32[8]{0} conditional(%index, %x, %x), branch_computations={%short, %body}
}
"""


def test_launches():
    assert accelerator.launches(HLO) == timing.entry_instructions(HLO)
    assert timing.entry_instructions(LOOP) == 3
    assert accelerator.launches(LOOP) == 5 * 3 + 3 + 2


def test_kernels_of_one_kind_have_one_name():
    names = ["loop_fusion.12", "void trsm_kernel<float, 32>(float*)", "void cutlass::Kernel2<x_1>"]
    assert list(map(accelerator.operation, names)) == [
        "loop_fusion",
        "trsm_kernel",
        "cutlass::Kernel",
    ]
