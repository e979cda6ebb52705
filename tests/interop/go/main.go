// Command kas-interop-peer is a go-libp2p node that does what a test tells it.
//
//	kas-interop-peer listen [flags] [ADDR ...]     listen (default /ip4/127.0.0.1/tcp/0)
//
// Two more commands, of hole punching, are described at punch.
//
// One JSON object per line on stdout, each with a field "event". Orders come as JSON objects, one per line on stdin, each
// answered by {"event": "done", "id": 1, ...} or {"event": "failed", "id": 1, "error": "..."}. It exits when stdin closes.
// The orders are the cases of carryOut.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/event"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/client"
	relayv2 "github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/relay"
	"github.com/libp2p/go-libp2p/p2p/security/noise"
	"github.com/libp2p/go-libp2p/p2p/transport/tcp"
	"github.com/multiformats/go-multiaddr"
)

const (
	echo     = "/kas-interop/echo/1.0.0"
	patience = 30 * time.Second
)

type object map[string]any

var out sync.Mutex

func report(name string, fields object) {
	line := object{"event": name}
	for key, value := range fields {
		line[key] = value
	}
	text, err := json.Marshal(line)
	if err != nil {
		panic(err)
	}
	out.Lock()
	defer out.Unlock()
	os.Stdout.Write(append(text, '\n'))
}

func main() {
	var err error
	switch {
	case len(os.Args) > 1 && os.Args[1] == "listen":
		err = run(os.Args[2:])
	case len(os.Args) == 4 && (os.Args[1] == "reserve" || os.Args[1] == "dial"):
		err = runPunch(os.Args[1], os.Args[2], os.Args[3])
	default:
		fmt.Fprintln(os.Stderr, "usage: kas-interop-peer listen [flags] [ADDR ...] | reserve RELAY LISTEN | dial CIRCUIT LISTEN")
		os.Exit(2)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(arguments []string) error {
	flags := flag.NewFlagSet("listen", flag.ExitOnError)
	relay := flags.Bool("relay", false, "be a relay with the library's limits; of these, the following change one")
	open := flags.Bool("relay-open", false, "be a relay without limits")
	size := flags.Int64("relay-bytes", 0, "bytes of one circuit in each direction")
	seconds := flags.Float64("relay-seconds", 0, "seconds of one circuit")
	reservation := flags.Float64("relay-reservation", 0, "seconds of one reservation")
	places := flags.Int("relay-places", 0, "reservations in all")
	auto := flags.String("auto-relay", "", "find out nothing, but be reachable through the relay at this address")
	autonat := flags.Bool("autonat", false, "AutoNAT v1 service and v2, both ways")
	if err := flags.Parse(arguments); err != nil {
		return err
	}
	listen := flags.Args()
	if len(listen) == 0 {
		listen = []string{"/ip4/127.0.0.1/tcp/0"}
	}
	options := []libp2p.Option{
		libp2p.ListenAddrStrings(listen...),
		libp2p.Transport(tcp.NewTCPTransport),
		libp2p.Security(noise.ID, noise.New),
		libp2p.Muxer(yamux.ID, yamux.DefaultTransport),
		libp2p.ResourceManager(&network.NullResourceManager{}),
		libp2p.WithDialTimeout(patience),
		// 5 seconds else, the handshakes through a relay included, in which a busy machine does nothing for us.
		libp2p.SwarmOpts(swarm.WithDialTimeoutLocal(patience)),
	}
	if *relay || *open {
		resources := relayv2.DefaultResources()
		if *open {
			resources.Limit = nil
			resources.MaxReservationsPerIP, resources.MaxCircuits = resources.MaxReservations, 1024
		}
		if *size > 0 {
			resources.Limit.Data = *size
		}
		if *seconds > 0 {
			resources.Limit.Duration = duration(*seconds)
		}
		if *reservation > 0 {
			resources.ReservationTTL = duration(*reservation)
		}
		if *places > 0 {
			resources.MaxReservations = *places
		}
		options = append(options, libp2p.EnableRelayService(relayv2.WithResources(resources)), libp2p.ForceReachabilityPublic())
	}
	if *auto != "" {
		target, err := peer.AddrInfoFromString(*auto)
		if err != nil {
			return err
		}
		options = append(options, libp2p.EnableAutoRelayWithStaticRelays([]peer.AddrInfo{*target}), libp2p.ForceReachabilityPrivate())
	}
	if *autonat {
		options = append(options, libp2p.EnableNATService(), libp2p.EnableAutoNATv2())
	}
	node, err := libp2p.New(options...)
	if err != nil {
		return err
	}
	defer node.Close()
	watch(node)
	report("started", object{"peer": node.ID().String()})
	for _, address := range node.Network().ListenAddresses() {
		if address.String() != "/p2p-circuit" { // it is ready to be reached through relays, too
			report("listening", object{"address": fmt.Sprintf("%s/p2p/%s", address, node.ID())})
		}
	}
	return obey(node)
}

func duration(seconds float64) time.Duration { return time.Duration(seconds * float64(time.Second)) }

func watch(node host.Host) {
	serveEcho(node)
	tell := func(connection network.Conn) object {
		direction := "inbound"
		if connection.Stat().Direction == network.DirOutbound {
			direction = "outbound"
		}
		return object{
			"peer": connection.RemotePeer().String(), "direction": direction, "remote": connection.RemoteMultiaddr().String(),
			"limited": connection.Stat().Limited,
		}
	}
	node.Network().Notify(&network.NotifyBundle{
		ConnectedF:    func(_ network.Network, connection network.Conn) { report("connected", tell(connection)) },
		DisconnectedF: func(_ network.Network, connection network.Conn) { report("disconnected", tell(connection)) },
	})
	changes, err := node.EventBus().Subscribe([]any{
		new(event.EvtHostReachableAddrsChanged), new(event.EvtPeerIdentificationCompleted),
	})
	if err != nil {
		panic(err)
	}
	go func() {
		for each := range changes.Out() {
			switch change := each.(type) {
			case event.EvtHostReachableAddrsChanged:
				report("reachability", object{
					"reachable": texts(change.Reachable), "unreachable": texts(change.Unreachable), "unknown": texts(change.Unknown),
				})
			case event.EvtPeerIdentificationCompleted:
				observed := ""
				if change.ObservedAddr != nil {
					observed = change.ObservedAddr.String()
				}
				report("identified", object{
					"peer": change.Peer.String(), "remote": change.Conn.RemoteMultiaddr().String(), "agent": change.AgentVersion,
					"addresses": texts(change.ListenAddrs), "observed": observed, "signed": change.SignedPeerRecord != nil,
				})
			}
		}
	}()
}

func serveEcho(node host.Host) {
	node.SetStreamHandler(echo, func(stream network.Stream) {
		if _, err := io.Copy(stream, stream); err != nil {
			stream.Reset()
			return
		}
		stream.Close()
	})
}

func texts(addresses []multiaddr.Multiaddr) []string {
	all := []string{}
	for _, each := range addresses {
		all = append(all, each.String())
	}
	return all
}

type order struct {
	ID      int
	Do      string
	Peer    string
	Address string
	Size    int
}

func obey(node host.Host) error {
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		var what order
		if err := json.Unmarshal(lines.Bytes(), &what); err != nil {
			return fmt.Errorf("no order: %w", err)
		}
		go func() {
			context, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			answer, err := carryOut(context, node, what)
			if err != nil {
				report("failed", object{"id": what.ID, "error": err.Error()})
				return
			}
			answer["id"] = what.ID
			report("done", answer)
		}()
	}
	return lines.Err()
}

func carryOut(context context.Context, node host.Host, what order) (object, error) {
	switch what.Do {
	case "connect": // to address, directly or through a relay
		target, err := peer.AddrInfoFromString(what.Address)
		if err != nil {
			return nil, err
		}
		return object{"peer": target.ID.String()}, node.Connect(context, *target)
	case "reserve": // with the relay at address
		target, err := peer.AddrInfoFromString(what.Address)
		if err != nil {
			return nil, err
		}
		if err := node.Connect(context, *target); err != nil {
			return nil, err
		}
		made, err := client.Reserve(context, node, *target)
		if err != nil {
			return nil, err
		}
		return object{
			"expires": made.Expiration.Unix(), "addresses": texts(made.Addrs), "voucher": made.Voucher != nil,
			"seconds": made.LimitDuration.Seconds(), "bytes": made.LimitData,
		}, nil
	case "echo": // size bytes to peer, on whatever connection there is
		return exchange(context, node, what)
	case "disconnect":
		id, err := peer.Decode(what.Peer)
		if err != nil {
			return nil, err
		}
		return object{}, node.Network().ClosePeer(id)
	}
	return nil, fmt.Errorf("no such order: %s", what.Do)
}

func exchange(context context.Context, node host.Host, what order) (object, error) {
	id, err := peer.Decode(what.Peer)
	if err != nil {
		return nil, err
	}
	stream, err := node.NewStream(network.WithAllowLimitedConn(context, "a test"), id, echo)
	if err != nil {
		return nil, err
	}
	defer stream.Reset()
	sent := bytes.Repeat([]byte("kaspa"), what.Size/5+1)[:what.Size]
	failed := make(chan error, 1)
	go func() {
		_, err := stream.Write(sent)
		failed <- errors.Join(err, stream.CloseWrite())
	}()
	began := time.Now()
	got, err := io.ReadAll(stream)
	if err := errors.Join(err, <-failed); err != nil {
		return nil, err
	}
	return object{
		"intact": bytes.Equal(sent, got), "seconds": time.Since(began).Seconds(), "limited": stream.Conn().Stat().Limited,
		"relayed": describe(stream.Conn())["relayed"],
	}, nil
}
