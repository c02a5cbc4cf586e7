#!/bin/bash
# Tags a day's catalogue on the cluster of this head, and again where that fails; for cron (night.cron).
#
#     night.sh DAY [options of jobs/tag.py]
export RAY_API_SERVER_ADDRESS=${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}
home=$(cd "$(dirname "$0")/../.." && pwd)
day=$1
shift
for _ in 1 2 3; do # a night goes on where the attempt before ended; one that is finished does nothing
  ray job submit -- python "$home/jobs/tag.py" --date "$day" "$@" && exit 0
  sleep "${PAUSE:-60}"
done
exit 1
