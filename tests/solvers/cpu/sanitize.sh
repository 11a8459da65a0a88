#!/bin/sh
# sanitize.sh SANITIZERS VARIANT [library]: compiles driver.cpp with sanitizers and the flags of a variant, and runs it;
# or compiles the library itself, into build/sanitize/. From the root of the source tree; the Makefile calls it.
set -e
sanitizers=$1 variant=$2
sources=diffopt/solvers/cpu
flags="$(sed -n 's/^all //p' $sources/variants.txt) $(sed -n "s/^$variant *//p" $sources/variants.txt)"
if [ "$variant" != baseline ] &&
    ! echo '#include <immintrin.h>' | ${CXX:-c++} $flags -x c++ -fsyntax-only - 2>/dev/null; then
    echo "$sanitizers, $variant: left out, the compiler does not know these instructions"
    exit
fi
flags="$flags -O1 -g -fno-omit-frame-pointer -fsanitize=$sanitizers -fno-sanitize-recover=all -pthread"
mkdir -p build/sanitize
if [ "$3" = library ]; then
    # shellcheck disable=SC2086 # flags are words
    ${CXX:-c++} $flags -fPIC -shared $sources/executor.cpp -o "build/sanitize/libdiffopt_cpu_$variant.so"
    exit
fi
driver="build/sanitize/driver_$(echo "$sanitizers" | tr , _)_$variant"
# shellcheck disable=SC2086
${CXX:-c++} $flags tests/solvers/cpu/driver.cpp -o "$driver"
if ! output=$("$driver" 2>&1); then
    printf '%s\n' "$output"
    echo "$sanitizers, $variant: FAILED"
    exit 1
fi
echo "$sanitizers, $variant: $output"
