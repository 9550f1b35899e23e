#!/bin/bash
# Merges SPEC into OUT in N parts on a Slurm cluster, and joins them when all have ended:
#   examples/slurm/submit.sh SPEC OUT N [FLAG …]
# All paths, OUT too, must be on a disk that all nodes share; models and OUT may also be addresses,
# such as s3://bucket/merged. Flags that `run` and `join` both take, such as --shard-size 1GB, go to
# both. Prints the numbers of the two jobs.
set -euo pipefail
if (($# < 3)); then
    echo "usage: $0 SPEC OUT N [FLAG …]" >&2
    exit 2
fi
spec=$1 out=$2 num_parts=$3
here=$(dirname "$(realpath "$0")")

parts=$(sbatch --parsable --array="1-$num_parts" "$here/part.sbatch" "$spec" "$out" "$num_parts" "${@:4}")
# afterany: where parts have failed, the log of the join says which, and how to run them again.
join=$(sbatch --parsable --dependency="afterany:$parts" "$here/join.sbatch" "$spec" "$out" "${@:4}")
echo "parts: job array $parts; join: job $join"
