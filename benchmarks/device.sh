#!/usr/bin/env bash
# Builds, checks and measures the project on a machine with a GPU, in one call.
set -uo pipefail

usage() {
  cat <<'TEXT'
benchmarks/device.sh [--budget SECONDS] [--steps NAME,...] [--out FOLDER] [--lengths N,...] [--device NAME]

Builds in place for the GPU that is there, checks every operator against the CPU, runs the device tests and
compute-sanitizer, and times attention beside torch's flash and cuDNN kernels. It installs nothing and needs no network:
python3 with torch 2.11 or newer for CUDA and pytest, nvcc, a C++20 compiler, ninja.

steps, in this order; the default is all of them:
  facts      the card, its driver, versions
  build      python3 setup.py build_ext --inplace, for the card's architecture
  smoke      every path of an operator once against the CPU; one that fails is not timed
  tests      tests/cuda/test_device.py
  sanitizer  compute-sanitizer's memcheck and racecheck on a few small calls
  table      the card's own ceilings, then times and memory over lengths
  counters   what Nsight Compute counts of the slowest kernels (ncu); only on demand

options:
  --budget SECONDS  for everything, default 480. A step that runs out of its share says so, and the rest goes on; what
                    earlier steps leave goes to later ones
  --steps NAME,...  which
  --out FOLDER      for device.json, all results, and device.log; default $OUT, else benchmarks/results
  --lengths N,...   tokens of the table, default 1024,4096,16384,65536
  --device NAME     cuda (default), or emulator: the kernels on the CPU, without the steps build, tests, sanitizer
                    and counters; for tests of this script

examples:
  benchmarks/device.sh                                           everything, 8 minutes
  benchmarks/device.sh --budget 200 --steps facts,build,smoke,table
  benchmarks/device.sh --steps tests                             after a build

Last it prints a line per step and the table. Exit code: 0 if every step that ran passed, else 1.
TEXT
}

fail() { echo "device.sh: $1; benchmarks/device.sh --help lists the options" >&2; exit 2; }

budget=480 steps=facts,build,smoke,tests,sanitizer,table out=${OUT:-} lengths=1024,4096,16384,65536 device=cuda
while (($#)); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --budget | --steps | --out | --lengths | --device)
      (($# > 1)) || fail "$1 needs a value"
      printf -v "${1#--}" %s "$2"
      shift 2
      ;;
    *) fail "unknown option $1" ;;
  esac
done
[[ $budget =~ ^[1-9][0-9]*$ ]] || fail "--budget: expected a number of seconds, got '$budget'"
[[ $lengths =~ ^[1-9][0-9]*(,[1-9][0-9]*)*$ ]] || fail "--lengths: expected numbers with commas between, got '$lengths'"
[[ $device == cuda || $device == emulator ]] || fail "--device: expected cuda or emulator, got '$device'"
known=" facts build smoke tests sanitizer table counters "
for name in ${steps//,/ }; do
  [[ $known == *" $name "* ]] || fail "--steps: expected some of$known, got '$name'"
done

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
out=${out:-benchmarks/results} work=$PWD/build/device
mkdir -p "$out" "$work" && out=$(cd "$out" && pwd) || exit 1
rm -f "$work"/*.{log,tsv,json}
python=${PYTHON:-python3}
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=PASSIVE

# -------------------- steps

GRACE=10 # seconds in which a step that keeps its time itself, but for the start of Python, ends

wants() { [[ ,$steps, == *",$1,"* ]]; }

# Of the time that is left, the part that a step gets: its weight among those of the chosen steps from it on.
share() {
  local left=$((budget - SECONDS)) mine=0 all=0 pair
  for pair in facts:4 build:60 smoke:12 tests:35 sanitizer:18 table:50 counters:12; do
    wants "${pair%:*}" || continue
    ((all == 0)) && [[ ${pair%:*} != "$1" ]] && continue
    ((all == 0)) && mine=${pair#*:}
    ((all += ${pair#*:}))
  done
  # What cannot be cut short takes what it needs.
  [[ $1 == build ]] && { echo $((left - 5)); return; }
  echo $((left * mine / all))
}

# step NAME COMMAND...: runs it within its share, with its output in a log, and notes how it ended.
step() {
  local name=$1 limit start=$SECONDS code result
  shift
  wants "$name" || return 0
  limit=$(share "$name")
  if ((limit < 2)); then
    result="left out: no time left" code=1
  else
    echo "== $name (at most $limit s)"
    STEP_SECONDS=$limit timeout -k 5 "$((limit + GRACE))" "$@" > "$work/$name.log" 2>&1
    code=$?
    case $code in
      0) result=passed ;;
      3) result="not possible here" ;;
      124 | 137) result="stopped after $limit s" ;;
      *) result="failed" ;;
    esac
    tail -n "${STEP_LINES:-4}" "$work/$name.log"
  fi
  printf '%s\t%s\t%s\t%s\n' "$name" "$result" "$((SECONDS - start))" "$code" >> "$work/steps.tsv"
  return "$code"
}

build() {
  local capability
  capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || return 1
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability} MAX_JOBS=${MAX_JOBS:-$(nproc)} FORCE_CUDA=1 \
    "$python" setup.py build_ext --inplace
}

tests() {
  local workers=() seconds=$((STEP_SECONDS > 10 ? STEP_SECONDS - 5 : STEP_SECONDS))
  "$python" -c 'import xdist' 2> /dev/null && workers=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
  OMP_NUM_THREADS=2 timeout -s INT "$seconds" "$python" -m pytest -q --tb=short -p no:cacheprovider "${workers[@]}" \
    tests/cuda/test_device.py
}

# The kernels' accesses alone: torch's allocator would hide those next to a tensor in memory that it holds.
sanitizer() {
  local tool found=0 code seconds=$((STEP_SECONDS / 2))
  tool=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2> /dev/null) ||
    { echo "compute-sanitizer is not installed"; return 3; }
  for check in memcheck racecheck; do
    echo "$check:"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 2 "$seconds" "$tool" --tool "$check" --error-exitcode 9 \
      --print-limit 8 "$python" benchmarks/device.py calls --device cuda
    code=$?
    case $code in
      0) ;;
      124 | 137) echo "$check: stopped after $seconds s, no error until then" ;;
      *) echo "$check: exit code $code"; found=1 ;;
    esac
  done
  return $found
}

counters() {
  local tool
  tool=$(command -v ncu || ls /usr/local/cuda/bin/ncu 2> /dev/null) || { echo "ncu is not installed"; return 3; }
  "$tool" --clock-control none --kernel-name regex:attention --launch-count 8 --section SpeedOfLight \
    --section Occupancy "$python" benchmarks/device.py calls --device cuda
}

script() { "$python" benchmarks/device.py "$@" --device "$device" --out "$work"; }
export -f build tests sanitizer counters script
export python work device

STEP_LINES=8 step facts bash -c 'script facts'
STEP_LINES=6
if [[ $device == cuda ]]; then
  STEP_LINES=3 step build bash -c build || { wants build && tail -n 30 "$work/build.log"; }
fi
STEP_LINES=12 step smoke bash -c 'script smoke --seconds "$STEP_SECONDS"'
if [[ $device == cuda ]]; then
  STEP_LINES=30 step tests bash -c tests
  STEP_LINES=14 step sanitizer bash -c sanitizer
fi
STEP_LINES=2 step table bash -c "script table --seconds \"\$STEP_SECONDS\" --lengths ${lengths//,/ }"
if [[ $device == cuda ]]; then STEP_LINES=40 step counters bash -c counters; fi
for name in $known; do
  [[ -e $work/$name.log ]] && printf '\n== %s\n' "$name" && cat "$work/$name.log"
done > "$out/device.log"
script summary
passed=$?
cp "$work/device.json" "$out/"
echo "written: $out/device.json, $out/device.log"
exit $passed
