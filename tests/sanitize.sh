#!/usr/bin/env bash
# Runs tests against the compiled part built with AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the
# repository: the installed library stays as it is. Fails on the first report.
#
#   tests/sanitize.sh [arguments of pytest]     by default: tests/kernels tests/nn
#
# Takes GCC, with the tests' Python packages in the environment.
set -euo pipefail
cd "$(dirname "$0")/.."
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$copy" --
cd "$copy"

suffix=$(python -c 'import importlib.machinery; print(importlib.machinery.EXTENSION_SUFFIXES[0])')
library=$PWD/cnmix/kernels/native/_native$suffix
compiler=${CXX:-g++}
# The flags of setup.py, but for those of speed.
"$compiler" -std=c++17 -O1 -g -fPIC -shared -fopenmp -fvisibility=hidden -ffp-contract=off -fno-math-errno \
  -fno-trapping-math -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer \
  cnmix/kernels/native/*.cpp -o "$library"

# The sanitizers must be there before Python is; so must libstdc++, whose exceptions they watch.
preload=
for name in libasan.so libubsan.so libstdc++.so; do
  preload+=${preload:+:}$("$compiler" -print-file-name=$name)
done
# Python keeps memory until it ends. An absurd size is an error of the caller's, which a test provokes.
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:detect_stack_use_after_return=0
export UBSAN_OPTIONS=print_stacktrace=1
export PYTHONPATH=$PWD LD_PRELOAD=$preload
loaded=$(python -c 'from cnmix.kernels import native; print(native.library()._name)')
[ "$loaded" = "$library" ] || { echo "the tests would load $loaded"; exit 1; }
[ $# -gt 0 ] || set -- tests/kernels tests/nn
# Output is not captured: a report goes past Python.
python -m pytest -p no:cacheprovider -s "$@"
