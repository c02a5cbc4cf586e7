#!/usr/bin/env bash
# A certificate authority of one's own, and a certificate for each address of the cluster's nodes: what Ray's TLS asks for.
#
#     cluster/certificates.sh FOLDER ADDRESS...
#
# FOLDER gets ca.crt, node.crt and node.key, which every node and every client needs, and ca.key, which none of them does: keep
# it elsewhere. They are good for a year; made again with the same ca.key, new ones are trusted beside the old.
set -euo pipefail

folder=$1
shift
mkdir -p "$folder"
cd "$folder"
umask 077

if [[ ! -e ca.key ]]; then
    openssl req -x509 -newkey rsa:4096 -nodes -sha256 -days 365 -subj "/CN=xmc_ray" -keyout ca.key -out ca.crt
fi
names=$(printf ',IP:%s' "$@")
openssl req -newkey rsa:2048 -nodes -sha256 -subj "/CN=xmc_ray node" -keyout node.key -out node.csr
openssl x509 -req -in node.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 365 -sha256 -out node.crt \
    -extfile <(printf 'subjectAltName=DNS:localhost%s' "$names")
rm node.csr
