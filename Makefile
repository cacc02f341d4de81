# `make help` lists the targets.

CARGO ?= cargo
# Packages of the system that the lab needs, by the program that shows whether they are there.
TOOLS := ip:iproute2 iptables-restore:iptables nft:nftables unshare:util-linux cc:gcc curl:curl \
	tinyproxy:tinyproxy-bin miniupnpd:miniupnpd-nftables turnutils_natdiscovery:coturn stun:stun-client timeout:coreutils \
	sshd:openssh-server ssh:openssh-client python3:python3 groff:groff-base
# What only the benchmarks need.
BENCH_TOOLS := turnserver:coturn chrt:util-linux socat:socat
# What only the test with a browser needs: 250 MB once unpacked.
BROWSER_TOOLS := chromium-headless-shell:chromium-headless-shell
RELEASE := target/release

.PHONY: help demo test check fmt matrix lossy failover servers herd chaos simulate sleep kills garbage bench soak browser benchtools browsertools tools man completions clean

help: ## Show this.
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: tools ## Two homes behind NATs, a direct QUIC session, the time line.
	$(CARGO) build --release --workspace --bins
	$(RELEASE)/demo

test: tools ## Every test, the lab's included.
	$(CARGO) build --workspace --bins
	$(CARGO) test --workspace

check: tools ## Format, clippy and rustdoc, warnings as errors.
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps

fmt: ## Format everything.
	$(CARGO) fmt --all

matrix: tools ## Every ordered pair of networks, 10 and 20 runs each; stray packets, foreseeable ports (about an hour).
	$(CARGO) build --release --workspace --bins
	$(RELEASE)/matrix
	$(RELEASE)/matrix --table accepting --runs 20
	$(RELEASE)/matrix --table accepting --runs 20 --late 300
	$(RELEASE)/matrix --table foreseeable --runs 20
	$(RELEASE)/matrix --table foreseeable --runs 20 --busy 10 --step 4

failover: tools ## 20 runs each: the direct path is cut, a router forgets, under a steady echo (half an hour).
	$(CARGO) build --release --workspace --bins
	$(RELEASE)/failover --runs 20

servers: tools ## 20 runs each: a server of two, or the only one, is lost under a steady echo (three quarters of an hour).
	$(CARGO) build --release --workspace --bins
	$(RELEASE)/servers --runs 20

herd: tools ## 2,000 peers come back to a server that was killed and started again.
	$(CARGO) build --release --workspace --bins
	$(RELEASE)/herd

lossy: tools ## 50 dials where every line loses 5 % of its packets.
	$(CARGO) build --release --workspace --bins
	$(RELEASE)/lossy

simulate: ## 200,000 random networks on virtual time, at no loss and at 5 % (a few minutes).
	$(CARGO) build --release -p end-to-end --bin simulate
	$(RELEASE)/simulate --runs 100000
	$(RELEASE)/simulate --runs 100000 --loss 0.05

sleep: tools ## Sessions through ten minutes of sleep of either side, and of both.
	$(CARGO) build --workspace --bins
	LAB_SLEEP_SECONDS=600 $(CARGO) test -p end-to-end --test lab -- sleep

kills: ## 200 times kill -9 while peers enrol, tokens are spent and bans made: the store keeps what was answered. SEED=n for a replay.
	KILLS=200 $(CARGO) test -p rendezvous --test kill -- --nocapture

chaos: tools ## Half an hour of everything at once: six peers, streams between all, every stall and its cause. SEED=n for another.
	$(CARGO) build --release --workspace --bins
	$(RELEASE)/chaos --seed $(or $(SEED),1)

garbage: tools ## A minute of random and mutated datagrams to every port, in a release build.
	$(CARGO) build --release --workspace --bins
	LAB_GARBAGE_SECONDS=60 $(CARGO) test --release -p end-to-end --test lab -- garbage

bench: benchtools ## The benchmarks: a session's goodput, the relay and STUN against their floors and coturn, forwarding against socat, files.
	$(CARGO) build --release --workspace --bins
	$(RELEASE)/goodput
	$(RELEASE)/relay_bench
	$(RELEASE)/forward
	$(RELEASE)/sending

soak: tools ## The relay at full load for SOAK seconds (600), channels coming and going.
	$(CARGO) build --release -p rendezvous -p end-to-end --bins
	$(RELEASE)/soak --seconds $(or $(SOAK),600)

browser: browsertools ## A browser behind a router learns its address from the server (installs headless Chromium).
	$(CARGO) build --workspace --bins
	$(CARGO) test -p end-to-end --test lab -- --ignored browser

# Installs what is missing: as root with apt-get, else it says what to install. No service that comes with a package is started.
tools:
	@$(call install,$(TOOLS))

benchtools:
	@$(call install,$(TOOLS) $(BENCH_TOOLS))

browsertools:
	@$(call install,$(TOOLS) $(BROWSER_TOOLS))

define install
missing=; export PATH="$$PATH:/usr/sbin:/sbin"; \
for pair in $(1); do \
  command -v "$${pair%%:*}" >/dev/null 2>&1 || missing="$$missing $${pair##*:}"; \
done; \
[ -z "$$missing" ] && exit 0; \
if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
  echo "installing:$$missing"; \
  policy=/usr/sbin/policy-rc.d; \
  [ -e $$policy ] || { printf '#!/bin/sh\nexit 101\n' > $$policy && chmod +x $$policy && trap "rm $$policy" EXIT; }; \
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; \
else \
  echo "these packages are missing:$$missing; install them, for instance: sudo apt-get install$$missing" >&2; exit 1; \
fi
endef

man: ## The man pages of peer and rendezvous, to target/man.
	$(CARGO) build -p peer -p rendezvous --bins
	target/debug/peer man target/man
	target/debug/rendezvous man target/man

completions: ## What bash, zsh and fish need to complete their commands, to target/completions.
	$(CARGO) build -p peer -p rendezvous --bins
	mkdir -p target/completions
	for program in peer rendezvous; do for shell in bash zsh fish; do \
	  target/debug/$$program completions $$shell >target/completions/$$program.$$shell || exit 1; \
	done; done

clean: ## Remove what was built.
	$(CARGO) clean
