"""The pytest plugin, as a project that installed it meets it."""

import pytest


@pytest.fixture
def project(pytester):
    """A project with the plugin; runs its tests in a process of their own."""
    pytester.makeini("[pytest]\naddopts = -p no:cacheprovider --strict-markers\n")
    return pytester


def test_a_test_gets_a_lab_that_reads_like_a_sentence(project):
    project.makepyfile(
        """
        def test_a_lab(lab):
            relay = lab.public("relay")
            alice = lab.home("alice", nat="pr", delay="5ms")
            assert alice.public_address == "11.2.0.2"
            assert alice.python(lambda: 40 + 2) == 42
        """
    )
    project.runpytest_subprocess().assert_outcomes(passed=1)


def test_types_and_pairs_are_parameters(project):
    project.makepyfile(
        """
        import pytest

        def test_all(nat_type): pass

        @pytest.mark.nat_types("pr", "sym")
        def test_some(nat_type): pass

        @pytest.mark.nat_types("pr", "cgn-sym")
        def test_pairs(nat_pair):
            assert nat_pair.alice.name == "alice"
            assert nat_pair.lab.topology.sites[1].type == nat_pair.types[1]
        """
    )
    result = project.runpytest_subprocess("-v")
    result.assert_outcomes(passed=26 + 2 + 3)
    result.stdout.fnmatch_lines(["*test_pairs?pr+cgn-sym? PASSED*", "*test_pairs?cgn-sym+cgn-sym? PASSED*"])


def test_an_unknown_type_is_an_error_of_the_file(project):
    project.makepyfile(
        """
        import pytest

        @pytest.mark.nat_types("cone")
        def test_it(nat_type): pass
        """
    )
    result = project.runpytest_subprocess()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*there is no NAT type 'cone'; there are: open, fw,*"])


def test_what_programs_wrote_and_what_passed_is_kept_when_a_test_fails(project):
    project.makepyfile(
        """
        import pytest

        @pytest.mark.natlab("alice=pr", "relay=public", seed=2, wan="1ms")
        def test_it(lab):
            assert lab.topology.seed == 2
            assert lab.topology.wan.delay == 0.001
            lab["alice"].run(["echo", "hello"])
            assert False
        """
    )
    result = project.runpytest_subprocess()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["*- natlab -*", "core", "├── 1 ms ── alice/router 11.1.0.2*", "*core.pcapng", "*alice-0-echo.stdout.log"]
    )
    (log,) = [line for line in result.stdout.lines if line.endswith("echo.stdout.log")]
    with open(log) as file:
        assert file.read() == "hello\n"


def test_it_is_kept_also_when_a_fixture_fails(project):
    project.makepyfile(
        """
        import pytest

        @pytest.fixture
        def service(lab):
            lab.home("alice").run(["sh", "-c", "echo hello; exit 1"])

        def test_it(service): pass
        """
    )
    result = project.runpytest_subprocess()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*- natlab -*", "*alice-0-sh.stdout.log"])


def test_an_option_that_the_marker_does_not_know_is_an_error(project):
    project.makepyfile(
        """
        import pytest

        @pytest.mark.natlab("alice=pr", delay="1ms")
        def test_it(lab): pass
        """
    )
    result = project.runpytest_subprocess()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*the marker natlab has no 'delay': it takes sites, wan and seed"])


def test_where_no_lab_can_be_made_tests_are_skipped_with_the_reason(project, monkeypatch):
    project.makepyfile("def test_it(lab): pass")
    project.makeconftest("import shutil\nshutil.which = lambda *_, **__: None")
    result = project.runpytest_subprocess("-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*natlab needs nft, which is not here: install the package nftables"])
    project.runpytest_subprocess("--natlab-required").assert_outcomes(errors=1)


def test_it_works_with_trio(project):
    pytest.importorskip("pytest_trio")
    project.makepyfile(
        """
        import socket
        import trio

        async def test_it(lab):
            relay, alice = lab.public("relay"), lab.home("alice", "sym")
            listener = trio.socket.from_stdlib_socket(relay.socket())
            client = trio.socket.from_stdlib_socket(alice.socket())
            with listener, client:
                await listener.bind(("0.0.0.0", 80))
                listener.listen()
                await client.connect((relay.address, 80))
                server, peer = await listener.accept()
                server.close()
                assert peer[0] == alice.public_address

            async def library():
                await trio.sleep(0)
                return trio.current_time() > 0

            assert await trio.to_thread.run_sync(alice.python, library)
        """
    )
    project.runpytest_subprocess("-o", "trio_mode=true").assert_outcomes(passed=1)


def test_it_works_without_trio(project):
    project.makepyfile("def test_it(lab): lab.home('alice').run(['true'])")
    project.runpytest_subprocess("-p", "no:trio", "-p", "no:pytest_trio").assert_outcomes(passed=1)


def test_it_works_under_xdist(project):
    pytest.importorskip("xdist")
    project.makepyfile(
        """
        import os
        import pytest

        @pytest.mark.parametrize("number", range(6))
        def test_it(lab, number):
            assert lab.home("alice").python(os.getenv, "NATLAB_HOST") == "alice"
        """
    )
    project.runpytest_subprocess("-n", "2").assert_outcomes(passed=6)


def test_it_works_under_a_debugger_that_follows_subprocesses(project):
    """Such a debugger, of an IDE, puts itself into the arguments of every Python that is started."""
    project.makeconftest(
        """
        import subprocess

        start = subprocess._fork_exec

        def followed(args, *rest):
            args = list(args)
            for flag in ("-c", "-m"):
                if flag in args:
                    args[args.index(flag) :] = ["-c", "raise SystemExit('no way to the debugger')"]
            return start(args, *rest)

        subprocess._fork_exec = followed
        """
    )
    project.makepyfile("def test_it(lab): assert lab.home('alice', delay='1ms').python(lambda: 42) == 42")
    project.runpytest_subprocess().assert_outcomes(passed=1)
