#!/usr/bin/env bash
# In CI, where it may, install the browser that tools/check_docs.py opens the pages in. Elsewhere nothing is installed:
# check_docs.py says then that it has looked at files only.
set -euo pipefail
have() { command -v "$1" >/dev/null 2>&1; }
browser() { have chromium || have chromium-browser || have google-chrome || have google-chrome-stable; }

if browser && have chromedriver; then exit 0; fi
if [ -z "${CI:-}" ] || [ "$(id -u)" != 0 ] || ! have apt-get; then exit 0; fi  # in CI check_docs.py fails without a browser
echo "Installing Debian's chromium and chromium-driver"
export DEBIAN_FRONTEND=noninteractive
apt-get -qq update
apt-get -qq install -y --no-install-recommends chromium chromium-driver fonts-dejavu-core >/dev/null
