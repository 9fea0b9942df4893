-- Money beside the orders: payments that come in, refunds that go out (INV-11).

CREATE TABLE payment (
    payment_no text PRIMARY KEY CHECK (payment_no ~ '^[a-z]{26}$'),
    order_no text NOT NULL UNIQUE,
    campaign_id text COLLATE "C" NOT NULL,
    order_seq bigint NOT NULL,
    member_no integer NOT NULL,
    amount_fen bigint NOT NULL CHECK (amount_fen > 0),
    provider text NOT NULL,
    pay_url text NOT NULL DEFAULT '',
    expires_at timestamptz NOT NULL,
    state text NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'paid', 'closed', 'disputed')),
    provider_ref text NOT NULL DEFAULT '',
    created_at timestamptz NOT NULL DEFAULT now(),
    paid_at timestamptz,
    paid_fen bigint NOT NULL DEFAULT 0,
    outcome text CHECK (outcome IN ('kept', 'revived', 'returned')),
    event_seq bigint,
    next_at timestamptz NOT NULL,
    tries integer NOT NULL DEFAULT 0,
    trouble text NOT NULL DEFAULT '',
    UNIQUE (campaign_id, order_seq),
    CONSTRAINT payment_paid_is_the_amount CHECK (state <> 'paid' OR paid_fen = amount_fen),
    CONSTRAINT payment_outcome_has_event CHECK ((outcome IS NULL) = (event_seq IS NULL))
);
CREATE INDEX payment_due ON payment (next_at)
    WHERE state = 'open' OR (state = 'paid' AND event_seq IS NULL);
COMMENT ON TABLE payment IS 'One payment an order. It is written before money can come in.';
COMMENT ON COLUMN payment.payment_no IS 'Our number at the provider, from the order''s number.';
COMMENT ON COLUMN payment.order_no IS 'Public number of the order.';
COMMENT ON COLUMN payment.campaign_id IS 'The campaign.';
COMMENT ON COLUMN payment.order_seq IS 'Number of the event that made the order.';
COMMENT ON COLUMN payment.member_no IS 'The member, by number.';
COMMENT ON COLUMN payment.amount_fen IS 'What is to be paid.';
COMMENT ON COLUMN payment.provider IS 'Name of the provider.';
COMMENT ON COLUMN payment.pay_url IS 'Where it is paid; empty: the provider has not answered yet.';
COMMENT ON COLUMN payment.expires_at IS 'Until when the provider takes the money.';
COMMENT ON COLUMN payment.state IS
    'open; paid; closed: no money can come in any more; disputed: another amount came in.';
COMMENT ON COLUMN payment.provider_ref IS 'The provider''s number of what came in.';
COMMENT ON COLUMN payment.created_at IS 'When it was made.';
COMMENT ON COLUMN payment.paid_at IS 'When we learned that it was paid.';
COMMENT ON COLUMN payment.paid_fen IS 'What came in.';
COMMENT ON COLUMN payment.outcome IS 'What the ledger decided; null: not presented or not applied yet.';
COMMENT ON COLUMN payment.event_seq IS 'Number of the event that says so.';
COMMENT ON COLUMN payment.next_at IS 'When the keeper looks at it next.';
COMMENT ON COLUMN payment.tries IS 'How often the keeper has tried its next step.';
COMMENT ON COLUMN payment.trouble IS 'Why its last try failed.';

CREATE TABLE refund (
    refund_no text PRIMARY KEY,
    payment_no text NOT NULL REFERENCES payment,
    campaign_id text COLLATE "C" NOT NULL,
    event_seq bigint NOT NULL,
    amount_fen bigint NOT NULL CHECK (amount_fen > 0),
    state text NOT NULL DEFAULT 'due' CHECK (state IN ('due', 'sent', 'done', 'stuck')),
    created_at timestamptz NOT NULL DEFAULT now(),
    done_at timestamptz,
    next_at timestamptz NOT NULL DEFAULT now(),
    tries integer NOT NULL DEFAULT 0,
    trouble text NOT NULL DEFAULT '',
    UNIQUE (campaign_id, event_seq)
);
CREATE INDEX refund_due ON refund (next_at) WHERE state IN ('due', 'sent');
CREATE INDEX refund_of_payment ON refund (payment_no);
COMMENT ON TABLE refund IS 'Money on its way back: one refund an event, driven until it is done.';
COMMENT ON COLUMN refund.refund_no IS 'Our number at the provider, the same at each try.';
COMMENT ON COLUMN refund.payment_no IS 'The payment whose money it is.';
COMMENT ON COLUMN refund.campaign_id IS 'The campaign.';
COMMENT ON COLUMN refund.event_seq IS 'Number of the event that gives it back.';
COMMENT ON COLUMN refund.amount_fen IS 'How much.';
COMMENT ON COLUMN refund.state IS
    'due; sent: the provider has accepted it; done: it has arrived; stuck: for people.';
COMMENT ON COLUMN refund.created_at IS 'When the event was applied.';
COMMENT ON COLUMN refund.done_at IS 'When it had arrived.';
COMMENT ON COLUMN refund.next_at IS 'When the keeper looks at it next.';
COMMENT ON COLUMN refund.tries IS 'How often the keeper has tried.';
COMMENT ON COLUMN refund.trouble IS 'Why its last try failed.';

CREATE TRIGGER payment_stays BEFORE DELETE OR TRUNCATE ON payment
    EXECUTE FUNCTION refuse_change('a payment is never removed');
CREATE TRIGGER refund_stays BEFORE DELETE OR TRUNCATE ON refund
    EXECUTE FUNCTION refuse_change('a refund is never removed');
CREATE TRIGGER payment_keeps_content BEFORE UPDATE ON payment FOR EACH ROW
    WHEN ((OLD.order_no, OLD.campaign_id, OLD.order_seq, OLD.member_no, OLD.amount_fen, OLD.provider)
          IS DISTINCT FROM
          (NEW.order_no, NEW.campaign_id, NEW.order_seq, NEW.member_no, NEW.amount_fen, NEW.provider)
          OR (OLD.state = 'paid' AND NEW.state <> 'paid')
          OR (OLD.event_seq IS NOT NULL AND OLD.event_seq <> NEW.event_seq))
    EXECUTE FUNCTION refuse_change('what was paid stays paid, and what it is for');
CREATE TRIGGER refund_keeps_content BEFORE UPDATE ON refund FOR EACH ROW
    WHEN ((OLD.payment_no, OLD.campaign_id, OLD.event_seq, OLD.amount_fen)
          IS DISTINCT FROM (NEW.payment_no, NEW.campaign_id, NEW.event_seq, NEW.amount_fen)
          OR (OLD.state = 'done' AND NEW.state <> 'done'))
    EXECUTE FUNCTION refuse_change('a refund goes forward only');

CREATE FUNCTION check_refunds_within_payment() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    bad record;
BEGIN
    SELECT r.payment_no INTO bad
    FROM refund r JOIN payment p USING (payment_no)
    WHERE r.payment_no IN (SELECT payment_no FROM fresh)
    GROUP BY r.payment_no, p.paid_fen HAVING sum(r.amount_fen) > p.paid_fen LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'refund: more than came in for %', bad.payment_no
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NULL;
END $$;
COMMENT ON FUNCTION check_refunds_within_payment IS
    'INV-11: no more goes back than came in.';
CREATE TRIGGER refunds_within_payment AFTER INSERT ON refund
    REFERENCING NEW TABLE AS fresh EXECUTE FUNCTION check_refunds_within_payment();

-- The test provider's own books (members/test_provider.py); empty where it is off.
CREATE TABLE test_payment (
    payment_no text PRIMARY KEY,
    amount_fen bigint NOT NULL,
    expires_at timestamptz NOT NULL,
    state text NOT NULL DEFAULT 'none' CHECK (state IN ('none', 'paid', 'failed', 'closed')),
    return_to text NOT NULL DEFAULT '',
    ref text NOT NULL DEFAULT ''
);
COMMENT ON TABLE test_payment IS 'What the test provider knows of a payment.';
COMMENT ON COLUMN test_payment.payment_no IS 'Our number.';
COMMENT ON COLUMN test_payment.amount_fen IS 'What is to be paid.';
COMMENT ON COLUMN test_payment.expires_at IS 'Until when it may be paid.';
COMMENT ON COLUMN test_payment.state IS 'none: yet to be paid; paid; failed: may be tried again; closed.';
COMMENT ON COLUMN test_payment.return_to IS 'Where the payer goes afterwards.';
COMMENT ON COLUMN test_payment.ref IS 'The provider''s number of the money.';
CREATE TABLE test_refund (
    refund_no text PRIMARY KEY,
    payment_no text NOT NULL REFERENCES test_payment,
    amount_fen bigint NOT NULL CHECK (amount_fen > 0)
);
COMMENT ON TABLE test_refund IS 'Money that the test provider has sent back.';
COMMENT ON COLUMN test_refund.refund_no IS 'Our number.';
COMMENT ON COLUMN test_refund.payment_no IS 'The payment.';
COMMENT ON COLUMN test_refund.amount_fen IS 'How much.';
