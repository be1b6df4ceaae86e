"""Says at the end of a run how many GPU tests did not run. Here, because pytest-xdist's controller loads no deeper one."""


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", [])
    missing = [r for r in skipped if "no Hopper GPU" in str(r.longrepr)]
    if missing:
        banner = f"GPU TESTS SKIPPED: {len(missing)} tests not run, no Hopper GPU here"
        terminalreporter.write_sep("=", banner, yellow=True, bold=True)
