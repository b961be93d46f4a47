"""tests/cuda/test_device.py runs in the emulator, as far as it asks nothing that only a GPU has, so that it is no
surprise on a machine with one."""

from __future__ import annotations

from testkit import ROOT, run_python

FILE = ROOT / "tests" / "cuda" / "test_device.py"
SOME = (
    *(f"float32_matches_the_definition[{seed}]" for seed in (3, 57, 120, 300)),
    "half_precision_errs_no_more_than_twice_the_formula_in_torch[19-torch.bfloat16]",
    "float64_accumulates_in_float64[29]",
    *(f"gradients_match_the_definition[{seed}]" for seed in (12, 57, 317)),
    "where_subtraction_would_cancel_queries_are_computed_again[True]",
    "lists_are_those_of_the_cpu[two pools-False-quadratic]",
    "lists_are_those_of_the_cpu[per query-True-none]",
    "lists_are_those_of_the_cpu[per query of two pools-False-none]",
    "clusters_are_those_of_the_definition[segments-torch.float32]",
    "two_runs_and_every_layout_give_the_same_bits[pooled-centroid]",
    "no_bit_of_the_past_depends_on_the_future[torch.bfloat16-per query-favor]",
    "no_bit_depends_on_what_padding_holds[window-quadratic-holes]",
    "no_bit_depends_on_how_much_padding_there_is[empty-favor]",
    "a_module_gives_the_results_and_gradients_of_the_cpu",
    "a_module_is_calibrated_and_saved_on_the_device",
    "autocast_computes_in_half_precision",
    "a_compiled_call_gives_the_same_results",
    "a_transformers_model_gives_the_results_of_the_cpu",
    "the_default_pair_runs_in_an_encoder",
    "a_decoder_learns",
    "a_whole_training_step_can_be_captured_in_a_graph[torch.bfloat16]",
    "clusters_have_the_same_bits_every_time",
    "empty_inputs_are_fine",
)


def test_the_tests_of_a_gpu_pass_in_the_emulator(emulator: object) -> None:
    arguments = ("-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-x")
    chosen = [f"{FILE}::test_{name}" for name in SOME]
    run = run_python(*arguments, *chosen, cwd=ROOT, SCATTERBRAIN_DEVICE_TESTS="emulator", CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 0, run.stdout[-4000:]
    assert int(run.stdout.split(" passed")[0].split()[-1]) >= 30


def test_without_a_gpu_they_are_skipped_for_one_reason() -> None:
    arguments = ("-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", FILE, "-k", "module")
    run = run_python(*arguments, cwd=ROOT, SCATTERBRAIN_DEVICE_TESTS="", CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 0, run.stdout[-4000:]
    assert "needs a CUDA device" in run.stdout and " passed" not in run.stdout and " failed" not in run.stdout
