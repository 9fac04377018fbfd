"""The test files that run where the kernels do; ``make gpu`` reads this without importing torch."""

from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
# What these files hold to the reference runs in the interpreter without a GPU, on it with one. Every operation's own
# file is among them.
ON_THE_GPU = {f"test_{file.stem}" for file in (TESTS.parent / "kernels" / "device").glob("[a-z]*.py")}
ON_THE_GPU = {name for name in ON_THE_GPU if (TESTS / f"{name}.py").exists()} | {
    "test_activations", "test_autoencoder", "test_autotune", "test_aux_zipf", "test_budgets", "test_codes",
    "test_crosscoder_kernels", "test_decode_sources", "test_encode", "test_energy_share", "test_feature_choice",
    "test_losses", "test_narrow_moments", "test_operations", "test_own_rule", "test_prefixes", "test_registration",
    "test_rule_losses", "test_rules", "test_training_capture", "test_training_gradients", "test_training_step",
    "test_training_updates", "test_waits",
}  # fmt: skip
NOT_EMULATED = {"test_autotune", "test_waits"}  # many configurations of the same kernels; a device that is played
