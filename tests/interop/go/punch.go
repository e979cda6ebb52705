package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/event"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	"github.com/libp2p/go-libp2p/p2p/protocol/holepunch"
	"github.com/libp2p/go-libp2p/p2p/security/noise"
	"github.com/libp2p/go-libp2p/p2p/transport/tcp"
	"github.com/multiformats/go-multiaddr"
)

// poll is how often it is asked whether the hole puncher has an address yet: nothing tells.
const poll = 5 * time.Millisecond

// punch is the commands
//
//	kas-interop-peer reserve RELAY LISTEN      keep a place on RELAY, for whoever dials
//	kas-interop-peer dial CIRCUIT LISTEN       dial through the relay, wait for the direct connection, use it
//
// Their events are those of the Rust peer's punch.rs, each with "at", seconds since the start; "punch" is what the
// library's tracer says of each stage: "stage", and its fields.
type punch struct {
	start time.Time
	node  host.Host
	dials bool
	mutex sync.Mutex
	met   map[peer.ID]time.Time // when the circuit with a peer came up; zero once it is direct
}

func runPunch(command, target, listen string) error {
	via, _, isCircuit := strings.Cut(target, "/p2p-circuit")
	if isCircuit != (command == "dial") {
		return fmt.Errorf("%s needs the address of a %s", command, map[bool]string{true: "circuit", false: "relay"}[command == "dial"])
	}
	relay, err := peer.AddrInfoFromString(via)
	if err != nil {
		return err
	}
	this := &punch{start: time.Now(), dials: command == "dial", met: map[peer.ID]time.Time{}}
	options := []libp2p.Option{
		libp2p.ListenAddrStrings(listen),
		libp2p.Transport(tcp.NewTCPTransport),
		libp2p.Security(noise.ID, noise.New),
		libp2p.Muxer(yamux.ID, yamux.DefaultTransport),
		libp2p.ResourceManager(&network.NullResourceManager{}),
		libp2p.EnableHolePunching(holepunch.WithTracer(this)),
		libp2p.ForceReachabilityPrivate(),
	}
	if !this.dials {
		options = append(options, libp2p.EnableAutoRelayWithStaticRelays([]peer.AddrInfo{*relay}))
	}
	if this.node, err = libp2p.New(options...); err != nil {
		return err
	}
	defer this.node.Close()
	serveEcho(this.node)
	this.node.Network().Notify(&network.NotifyBundle{ConnectedF: this.connected, DisconnectedF: func(_ network.Network, connection network.Conn) {
		this.report("closed", describe(connection))
	}})
	this.report("started", object{"peer": this.node.ID().String()})
	failed := make(chan error, 2)
	go func() { failed <- this.run(*relay, target) }()
	go func() {
		lines := bufio.NewScanner(os.Stdin)
		for lines.Scan() {
		}
		failed <- errors.Join(lines.Err(), errEnd)
	}()
	for err := range failed {
		if errors.Is(err, errEnd) {
			return nil
		} else if err != nil {
			return err
		}
	}
	return nil
}

var errEnd = errors.New("stdin has ended")

func (this *punch) report(name string, fields object) {
	fields["at"] = time.Since(this.start).Seconds()
	report(name, fields)
}

// run gets a place, or dials, once hole punching is possible.
func (this *punch) run(relay peer.AddrInfo, target string) error {
	places, err := this.node.EventBus().Subscribe(new(event.EvtAutoRelayAddrsUpdated))
	if err != nil {
		return err
	}
	if this.dials {
		if err := this.node.Connect(context.Background(), relay); err != nil {
			return err
		}
		this.waitReady()
		info, err := peer.AddrInfoFromString(target)
		if err != nil {
			return err
		}
		return this.node.Connect(context.Background(), *info)
	}
	for each := range places.Out() {
		this.waitReady()
		for _, address := range each.(event.EvtAutoRelayAddrsUpdated).RelayAddrs {
			this.report("reserved", object{"address": fmt.Sprintf("%s/p2p/%s", address, this.node.ID())})
		}
	}
	return nil
}

func (this *punch) waitReady() {
	for !slices.Contains(this.node.Mux().Protocols(), holepunch.Protocol) {
		time.Sleep(poll)
	}
}

func (this *punch) connected(_ network.Network, connection network.Conn) {
	fields, peer := describe(connection), connection.RemotePeer()
	this.report("connected", fields)
	this.mutex.Lock()
	defer this.mutex.Unlock()
	since, known := this.met[peer]
	if fields["relayed"] == true {
		if !known {
			this.met[peer] = time.Now()
		}
	} else if known && !since.IsZero() {
		this.met[peer] = time.Time{}
		fields["seconds"] = time.Since(since).Seconds()
		this.report("direct", fields)
		if this.dials {
			go this.use(peer)
		}
	}
}

// use echoes: the library takes the direct connection for a new stream if there is one.
func (this *punch) use(id peer.ID) {
	answer, err := exchange(context.Background(), this.node, order{Peer: id.String(), Size: 5})
	if err != nil {
		answer = object{"intact": false, "error": err.Error()}
	}
	this.report("echoed", answer)
}

// Trace is called by the library.
func (this *punch) Trace(stage *holepunch.Event) {
	fields := object{"stage": stage.Type}
	switch what := stage.Evt.(type) {
	case *holepunch.DirectDialEvt:
		fields["ok"], fields["error"], fields["seconds"] = what.Success, what.Error, what.EllapsedTime.Seconds()
	case *holepunch.ProtocolErrorEvt:
		fields["error"] = what.Error
	case *holepunch.StartHolePunchEvt:
		fields["addresses"], fields["rtt"] = what.RemoteAddrs, what.RTT.Seconds()
	case *holepunch.EndHolePunchEvt:
		fields["ok"], fields["error"], fields["seconds"] = what.Success, what.Error, what.EllapsedTime.Seconds()
	case *holepunch.HolePunchAttemptEvt:
		fields["attempt"] = what.Attempt
	}
	this.report("punch", fields)
}

func describe(connection network.Conn) object {
	_, err := connection.RemoteMultiaddr().ValueForProtocol(multiaddr.P_CIRCUIT)
	return object{
		"peer": connection.RemotePeer().String(), "relayed": err == nil,
		"dialed": connection.Stat().Direction == network.DirOutbound, "remote": connection.RemoteMultiaddr().String(),
	}
}
