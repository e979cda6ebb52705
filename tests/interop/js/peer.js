/**
 * A js-libp2p node that does what a test tells it.
 *
 *     node peer.js listen [--relay | --relay-open] [--relay-bytes N] [--relay-seconds N] [--relay-places N] [--autonat]
 *                         [--dcutr] [ADDR ...]
 *
 * One JSON object per line on stdout, each with a field `event`. Orders come as JSON objects, one per line on stdin, each
 * answered by {"event": "done", "id": 1, ...} or {"event": "failed", "id": 1, "error": "..."}. It exits when stdin
 * closes. The orders are the entries of `orders`.
 */
import './node20.js'

import { createInterface } from 'node:readline'
import { parseArgs } from 'node:util'

import { noise } from '@chainsafe/libp2p-noise'
import { yamux } from '@chainsafe/libp2p-yamux'
import { autoNATv2 } from '@libp2p/autonat-v2'
import { circuitRelayServer, circuitRelayTransport } from '@libp2p/circuit-relay-v2'
import { dcutr } from '@libp2p/dcutr'
import { identify } from '@libp2p/identify'
import { peerIdFromString } from '@libp2p/peer-id'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'

const ECHO = '/kas-interop/echo/1.0.0'
const PATIENCE = 30_000
const POLL = 20

const report = (event, fields = {}) => process.stdout.write(JSON.stringify({ event, ...fields }) + '\n')

const { values: options, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    relay: { type: 'boolean' },
    'relay-open': { type: 'boolean' },
    'relay-bytes': { type: 'string' },
    'relay-seconds': { type: 'string' },
    'relay-places': { type: 'string' },
    autonat: { type: 'boolean' },
    dcutr: { type: 'boolean' }
  }
})
const [command, ...listen] = positionals
if (command !== 'listen') {
  process.stderr.write('usage: peer.js listen [options] [ADDR ...]\n')
  process.exit(2)
}

const services = { identify: identify({ timeout: PATIENCE }), ping: ping() }
if (options.relay || options['relay-open']) {
  services.relay = circuitRelayServer({
    reservations: {
      applyDefaultLimit: !options['relay-open'],
      ...(options['relay-bytes'] && { defaultDataLimit: BigInt(options['relay-bytes']) }),
      ...(options['relay-places'] && { maxReservations: Number(options['relay-places']) }),
      ...(options['relay-seconds'] && { defaultDurationLimit: Number(options['relay-seconds']) * 1000 })
    }
  })
}
if (options.dcutr) services.dcutr = dcutr()
if (options.autonat) services.autonat = autoNATv2({ startupDelay: 500 })

const node = await createLibp2p({
  addresses: {
    listen: listen.length > 0 ? listen : ['/ip4/127.0.0.1/tcp/0'],
    appendAnnounce: options.dcutr ? listen : [] // else it tells of no public address before AutoNAT has tested it
  },
  transports: [tcp(), circuitRelayTransport({
    reservationCompletionTimeout: PATIENCE,
    // Orders alone decide where it holds places: a relay that it discovers, by an identify that comes late, makes it renew
    // a place of under 10 minutes as one it has not asked for, fail at that, and give the place up.
    discoveryFilter: { has: () => true, add: () => {}, remove: () => {} }
  })],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  connectionManager: {
    inboundConnectionThreshold: 1000, // per second and IP, of which all who are here have the same one; else 5
    maxIncomingPendingConnections: 1000,
    addressDialTimeout: PATIENCE, // these are 5 to 10 seconds else, in which a busy machine does nothing for us
    inboundUpgradeTimeout: PATIENCE,
    inboundStreamProtocolNegotiationTimeout: PATIENCE,
    outboundStreamProtocolNegotiationTimeout: PATIENCE
  },
  connectionGater: { denyDialMultiaddr: () => false }, // else private addresses are not dialed
  services
})

/** Wait until there may be room to send, or the stream has ended. */
const room = (stream) => new Promise((resolve) => {
  for (const event of ['drain', 'close']) stream.addEventListener(event, resolve, { once: true })
})

const bytesOf = (piece) => (piece instanceof Uint8Array ? piece : piece.subarray())

await node.handle(ECHO, async (stream) => {
  try {
    for await (const piece of stream) {
      if (!stream.send(bytesOf(piece))) await room(stream)
    }
    await stream.close()
  } catch (error) {
    stream.abort(error)
  }
}, { runOnLimitedConnection: true })

const describe = (connection) => ({
  peer: connection.remotePeer.toString(),
  direction: connection.direction,
  remote: connection.remoteAddr.toString(),
  limited: connection.limits != null,
  bytes: connection.limits?.bytes == null ? null : Number(connection.limits.bytes), // left of them
  seconds: connection.limits?.seconds ?? null
})
node.addEventListener('connection:open', ({ detail }) => report('connected', describe(detail)))
node.addEventListener('connection:close', ({ detail }) => report('disconnected', describe(detail)))

const circuits = () => node.getMultiaddrs().map(String).filter((each) => each.includes('/p2p-circuit'))

async function until (condition) {
  const end = Date.now() + PATIENCE
  while (!condition()) {
    if (Date.now() > end) throw new Error('it did not happen in time')
    await new Promise((resolve) => setTimeout(resolve, POLL))
  }
}

const orders = {
  /** Connect to address, directly or through a relay. */
  async connect ({ address }) {
    const connection = await node.dial(multiaddr(address), { signal: AbortSignal.timeout(PATIENCE) })
    return { peer: connection.remotePeer.toString() }
  },

  /** Reserve with the relay at address, and be reachable through it. */
  async reserve ({ address }) {
    await node.components.transportManager.listen([multiaddr(address).encapsulate('/p2p-circuit')])
    await until(() => circuits().length > 0)
    return { addresses: circuits() }
  },

  /** Reserve anew with the relay peer, before it is time to. */
  async renew ({ peer }) {
    const { reservationStore } = node.components.transportManager.getTransports().find((each) => each.reservationStore)
    const { details } = await reservationStore.addRelay(peerIdFromString(peer), 'configured')
    return { expires: Number(details.reservation.expire) }
  },

  /** Ask a connected peer about itself. */
  async identify ({ peer }) {
    const [connection] = node.getConnections(peerIdFromString(peer))
    const { listenAddrs, observedAddr } = await node.services.identify.identify(connection)
    return { addresses: listenAddrs.map(String), observed: observedAddr?.toString() ?? '' }
  },

  /** Send size bytes to peer, on whatever connection there is, and read them again. */
  async echo ({ peer, size }) {
    // dialProtocol would look for another connection if this one is limited
    const [connection] = node.getConnections(peerIdFromString(peer))
    const stream = await connection.newStream(ECHO, { runOnLimitedConnection: true, signal: AbortSignal.timeout(PATIENCE) })
    const sent = Buffer.alloc(size, 'kaspa')
    const began = performance.now()
    const sending = (async () => {
      for (let at = 0; at < size; at += 65536) {
        if (!stream.send(sent.subarray(at, at + 65536))) await room(stream)
      }
      await stream.close()
    })()
    sending.catch(() => {}) // told when it is awaited, if reading does not fail as well
    const pieces = []
    for await (const piece of stream) pieces.push(bytesOf(piece))
    await sending
    return { intact: Buffer.concat(pieces).equals(sent), seconds: (performance.now() - began) / 1000 }
  },

  async disconnect ({ peer }) {
    await node.hangUp(peerIdFromString(peer))
    return {}
  }
}

report('started', { peer: node.peerId.toString() })
for (const address of node.getMultiaddrs()) report('listening', { address: address.toString() })

for await (const line of createInterface({ input: process.stdin })) {
  const { id, do: name, ...fields } = JSON.parse(line)
  const carryOut = async () => {
    if (!(name in orders)) throw new Error(`no such order: ${name}`)
    return await orders[name](fields)
  }
  carryOut().then(
    (answer) => report('done', { id, ...answer }),
    (error) => report('failed', { id, error: error.message })
  )
}
await node.stop()
process.exit(0)
