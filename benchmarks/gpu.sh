#!/usr/bin/env bash
# Everything that wants a GPU, in one go and without a network: `make gpu`, or `OUT=folder benchmarks/gpu.sh`.
#
# A part that fails or runs out of time does not stop the next; the exit status says whether all of them passed.
# Everything shown is also in $OUT/gpu.txt. Limits in seconds: T_INSTALL, T_TESTS, T_MEMCHECK, T_RACECHECK, and T_BENCH,
# which by default is what T_TOTAL (580) leaves. PYTHON names the interpreter (its torch is used as it is), GPU_JOBS the
# number of test processes, BENCH_ARGS what benchmarks/run.py gets beside --out and --seconds (`--only kernels --steps`:
# ten minutes hold no more). The benchmarks take over the verdicts of the tests and write their report in any case.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}
mkdir -p "$out"
out=$(cd "$out" && pwd)
log=$out/gpu.txt
: >"$log"
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1

verdicts=()
failed=0
status=0
trap 'echo "interrupted" | tee -a "$log"; exit 130' INT TERM

# part NAME SECONDS COMMAND...
part() {
  local name=$1 seconds=$2 started=$SECONDS
  shift 2
  printf '\n== %s (at most %s s): %s\n' "$name" "$seconds" "${*%%$'\n'*}" | tee -a "$log"
  timeout --signal=INT --kill-after=10 "$seconds" "$@" 2>&1 | tee -a "$log"
  status=${PIPESTATUS[0]}
  case $status in
    0) verdicts+=("passed   $name, $((SECONDS - started)) s") ;;
    124 | 137) verdicts+=("TIMEOUT  $name, after $seconds s") failed=1 ;;
    *) verdicts+=("FAILED   $name, exit status $status") failed=1 ;;
  esac
}

# sanitizer TOOL SECONDS: the tests marked `sanitizer`, each allocation its own so that a stray access has nowhere to land.
sanitizer() {
  if ! command -v compute-sanitizer >/dev/null; then
    verdicts+=("not run  $1: no compute-sanitizer on the PATH")
    return
  fi
  part "$1" "$2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool "$1" --target-processes application-only --error-exitcode 99 --print-limit 20 \
    "$python" -m pytest -q -x -p no:cacheprovider -p no:xdist -m sanitizer
}

versions='
import platform, torch
print("python", platform.python_version(), "· torch", torch.__version__, "· CUDA", torch.version.cuda, "· HIP", torch.version.hip)
import triton
print("triton", triton.__version__)
for i in range(torch.cuda.device_count()):
    p = torch.cuda.get_device_properties(i)
    print("device", i, p.name, f"sm_{p.major}{p.minor}", f"{p.total_memory / 2**30:.1f} GiB", p.multi_processor_count, "SMs")
assert torch.cuda.is_available(), "torch sees no GPU"
'

date -u +'%Y-%m-%dT%H:%M:%SZ' | tee -a "$log"
git rev-parse HEAD 2>/dev/null | tee -a "$log"
if command -v nvidia-smi >/dev/null; then timeout 20 nvidia-smi 2>&1 | tee -a "$log"; fi
SECONDS=0
part install "${T_INSTALL:-40}" "$python" -m pip install --quiet --no-deps --no-build-isolation -e .
part versions 30 "$python" -c "$versions"
workers=()
if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n "${GPU_JOBS:-4}" --dist loadfile); fi
part tests "${T_TESTS:-220}" "$python" -m pytest "${workers[@]}" -p no:cacheprovider -m 'not slow and not serial' \
  --junitxml="$out/gpu-tests.xml"
if [ "$status" -le 1 ]; then part verdicts 30 "$python" benchmarks/verify.py "$out/gpu-tests.xml"; fi  # all have run
sanitizer memcheck "${T_MEMCHECK:-75}"
sanitizer racecheck "${T_RACECHECK:-75}"
bench=${T_BENCH:-$((${T_TOTAL:-580} - SECONDS))}
# shellcheck disable=SC2086  # BENCH_ARGS is a list of arguments
part benchmarks "$bench" "$python" benchmarks/run.py --out "$out" --seconds $((bench - 25)) ${BENCH_ARGS:---only kernels --steps}

{
  printf '\n== summary\n'
  printf '%s\n' "${verdicts[@]}"
} | tee -a "$log"
exit "$failed"
