"""What every test shares: offline, seeded, interruptible, one thread a worker; without CUDA kernels are interpreted."""

import importlib.util
import os
import signal
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))
for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ[_name] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job; tests interrupt themselves
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" in os.environ:  # subprocesses of a test inherit it; torch's own setting is below
    os.environ["OMP_NUM_THREADS"] = "1"

import random  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from interpreter import mend_interpreter  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; read when triton is imported
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    mend_interpreter()

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


#: The quick tests of every part, marked `fast`: a file -> words of the names of its tests; no words: all of its tests.
FAST: dict[str, tuple[str, ...]] = {
    "test_architecture.py": ("imports", "arrows", "stay_short", "policy_file", "what_it_is_for", "left_for_later"),
    "test_attribution.py": (),
    "test_bench.py": ("hand_numbers", "published_ones", "cached_token", "planted_line", "no_record_no_figure"),
    "test_blocks.py": ("off_by_one", "eager_models"),
    "test_cache.py": ("streams_of_their_own[strict", "begins_a_new_stream[strict", "have_no_structure"),
    "test_cache_oracle.py": ("agrees_with_the_oracle[strict-llama-", "off_by_one_would_show[gpt_neox]"),
    "test_cli.py": ("version", "table_of_commands", "no_command_imports_none", "report_of_a_table"),
    "test_cliff.py": ("planted_parts", "no_share", "makes_no_sense"),
    "test_compat.py": ("newer_release", "insides", "found_by_what_it_is"),
    "test_data.py": ("prefix_gives", "refused"),
    "test_demo.py": ("promised_one", "same_cap"),
    "test_demo_plan.py": ("ladder_ends", "slower_machine", "largest_that_fits", "counts", "wrong_values"),
    "test_diagnosis.py": ("planted_spike", "points_at_drift", "noise_is_a_go", "reads_back"),
    "test_docs.py": ("document_holds", "leads_to", "one_page", "architecture_page", "faults_are_seen"),
    "test_engine.py": ("streams_are_independent[strict", "refused", "has_a_summary"),
    "test_engine_custom_generate.py": ("refused_by_name",),
    "test_engine_fused.py": ("independent[llama", "odd_widths", "a_cpu_serves"),
    "test_engine_generate.py": ("greedy_is_greedy", "wrong_arguments"),
    "test_engine_greedy.py": ("appends_the_likeliest[strict",),
    "test_engine_memory.py": ("need_of_the_streams",),
    "test_engine_packing.py": (),
    "test_engine_sampling.py": (),
    "test_engine_snapshot.py": ("one_weight",),
    "test_evaluation.py": ("full_is_one_plain_forward", "settings_that_are", "labels", "numerics"),
    "test_event_statistics.py": ("planted_spike",),
    "test_families.py": ("is_described", "not_listed", "do_not_exist"),
    "test_generate.py": ("while_nothing_is_evicted", "beam_search"),
    "test_measure.py": (),
    "test_models.py": ("shape_", "spec_finds", "by_name_or", "bad_option"),
    "test_ops_attention_decode.py": ("mistakes", "default_configuration"),
    "test_ops_begin_step.py": ("mistakes",),
    "test_ops_config.py": (),
    "test_ops_likeliest.py": ("mistakes",),
    "test_ops_linear_residual.py": ("mistakes",),
    "test_ops_norm_linear.py": ("mistakes",),
    "test_oracle.py": ("equals_transformers_in_float64", "bug_would_show"),
    "test_oracle_rules.py": (),
    "test_policies.py": (),
    "test_policy_options.py": (),
    "test_public_api.py": (),
    "test_recall.py": ("places_keep",),
    "test_records.py": (),
    "test_report.py": ("selection_is_by_content", "malformed", "replaced_and_checked"),
    "test_statistics.py": (),
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of `FAST`; skip, visibly, the tests marked `gpu` where torch sees no CUDA device."""
    for item in items:
        words = FAST.get(item.path.name)
        quick = words is not None and "slow" not in item.keywords and "gpu" not in item.keywords
        if quick and (not words or any(word in item.name for word in words)):
            item.add_marker("fast")
    gpu_items = [item for item in items if "gpu" in item.keywords]
    if gpu_items and not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed_everything() -> None:
    """Seed Python, NumPy and torch (CUDA too) before each test, so that order and workers change nothing."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
