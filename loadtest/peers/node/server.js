/*
 * The Node peer: fastify with schemas, and ioredis with auto-pipelining, so that what arrives in
 * one turn of the loop goes to Redis in one write. One process, as the engine's API on its core.
 *
 * node server.js --port N --redis-socket PATH --script FILE
 *
 * Redis decides in the same script as the other peers (lua/buy.lua) and keeps the order, as durably
 * as ours. It leaves out: the token's signature (the card is read from its claims as they stand),
 * replay of a repeated key, opening times, revoked cards and unions, the hash chain, the books in
 * PostgreSQL, and any check that the Redis which answers is the one that it was.
 */

import { randomBytes } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { parseArgs } from 'node:util'

import Fastify from 'fastify'
import { Redis } from 'ioredis'

const CARD_LIMIT = 3
const PRICE_FEN = 500

const { values: options } = parseArgs({
  options: { port: { type: 'string' }, 'redis-socket': { type: 'string' }, script: { type: 'string' } },
})

const redis = new Redis({ path: options['redis-socket'], enableAutoPipelining: true })
redis.defineCommand('buy', { numberOfKeys: 3, lua: readFileSync(options.script, 'utf8') })

const purchase = {
  type: 'object',
  required: ['quantity'],
  properties: {
    quantity: { type: 'integer', minimum: 1, maximum: CARD_LIMIT },
    showing: { type: 'string', default: 'general' },
  },
}
const text = { type: 'string' }
const integer = { type: 'integer' }
const order = {
  type: 'object',
  properties: {
    order_no: text,
    campaign: text,
    showing: text,
    quantity: integer,
    state: text,
    amount_fen: integer,
    pay_before: { type: 'null' },
    tickets: { type: 'array', items: { type: 'object', properties: { no: integer, code: text } } },
    card_remaining: integer,
  },
}
const refusal = {
  type: 'object',
  properties: { type: text, status: integer, code: text, remaining: integer, card_remaining: integer },
}

function cardOf(authorization) {
  return JSON.parse(Buffer.from(authorization.split('.')[1], 'base64url')).sub
}

function refuse(reply, status, code, more) {
  return reply
    .code(status)
    .type('application/problem+json')
    .send({ type: `/problems/${code}`, status, code, ...more })
}

const app = Fastify({ logger: false })
const schema = { body: purchase, response: { 201: order, '4xx': refusal } }

app.post('/api/v1/campaigns/:campaign/orders', { schema }, async (request, reply) => {
  const { campaign } = request.params
  const { quantity, showing } = request.body
  const key = request.headers['idempotency-key']
  let card
  try {
    card = cardOf(request.headers.authorization)
  } catch {
    return refuse(reply, 401, 'unauthenticated')
  }
  if (!card || !key) return refuse(reply, 400, 'invalid-request')
  const code = randomBytes(16).toString('hex')
  const [outcome, found, may] = await redis.buy(
    `stock:${campaign}`, `cards:${campaign}`, `orders:${campaign}`,
    card, quantity, CARD_LIMIT, key, showing, code,
  )
  if (outcome === -2) return refuse(reply, 404, 'not-found')
  if (outcome === -1) return refuse(reply, 409, 'limit-exceeded', { card_remaining: found })
  if (outcome === 0) return refuse(reply, 409, 'sold-out', { remaining: found })
  const tickets = []
  for (let no = 1; no <= quantity; no++) tickets.push({ no, code: `${code}-${no}` })
  const order_no = `${campaign}.${found}`
  return reply.code(201).header('location', `/api/v1/orders/${order_no}`).send({
    order_no, campaign, showing, quantity, state: 'confirmed',
    amount_fen: quantity * PRICE_FEN, pay_before: null, tickets, card_remaining: may,
  })
})

for (const signal of ['SIGTERM', 'SIGINT']) process.once(signal, () => process.exit(0))
await app.listen({ host: '127.0.0.1', port: Number(options.port) })
