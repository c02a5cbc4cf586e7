#!/bin/bash
# Tells Ray of the notice that EC2 gives to a spot machine two minutes before it takes it away: training saves at once, and
# nothing new starts here. Runs beside Ray on every worker; on a machine that is no spot one it waits for nothing.
metadata=${METADATA:-http://169.254.169.254}/latest
while sleep "${EVERY:-5}"; do
  token=$(curl -sf -m 5 -X PUT -H "X-aws-ec2-metadata-token-ttl-seconds: 60" "$metadata/api/token") || continue
  curl -sf -m 5 -o /dev/null -H "X-aws-ec2-metadata-token: $token" "$metadata/meta-data/spot/instance-action" || continue
  ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "notice of EC2" --deadline-remaining-seconds 110 && exit
done
