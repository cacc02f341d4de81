# `make help` lists the targets.

CARGO ?= cargo
# Packages of the system that the lab needs, by the program that shows whether they are there.
TOOLS := ip:iproute2 iptables-restore:iptables nft:nftables unshare:util-linux cc:gcc curl:curl \
	tinyproxy:tinyproxy-bin miniupnpd:miniupnpd-nftables
RELEASE := target/release

.PHONY: help demo test check fmt matrix lossy failover simulate sleep chaos garbage bench tools clean

help: ## Show this.
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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

chaos: tools ## Half an hour of everything at once: six peers, streams between all, every stall and its cause. SEED=n for another.
	$(CARGO) build --release --workspace --bins
	$(RELEASE)/chaos --seed $(or $(SEED),1)

garbage: tools ## A minute of random and mutated datagrams to every port, in a release build.
	$(CARGO) build --release --workspace --bins
	LAB_GARBAGE_SECONDS=60 $(CARGO) test --release -p end-to-end --test lab -- garbage

bench: tools ## The benchmarks.
	$(CARGO) build --release --workspace --bins
	$(RELEASE)/goodput

# Installs what is missing: as root with apt-get, else it says what to install.
tools:
	@missing=; export PATH="$$PATH:/usr/sbin:/sbin"; \
	for pair in $(TOOLS); do \
	  command -v "$${pair%%:*}" >/dev/null 2>&1 || missing="$$missing $${pair##*:}"; \
	done; \
	[ -z "$$missing" ] && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
	  echo "installing:$$missing"; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; \
	else \
	  echo "these packages are missing:$$missing; install them, for instance: sudo apt-get install$$missing" >&2; exit 1; \
	fi

clean: ## Remove what was built.
	$(CARGO) clean
