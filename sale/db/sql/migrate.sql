-- name: find_table -- Null where no migration ever ran.
select to_regclass('schema_migration');

-- name: create_table -- The record of what ran; the only table that no migration makes.
create table if not exists schema_migration (
    name       text primary key,
    sha256     text not null check (sha256 ~ '^[0-9a-f]{64}$'),
    applied_at timestamptz not null default now()
);

-- name: recorded -- What this database ran.
select name, sha256 from schema_migration order by name;

-- name: record -- One migration ran.
insert into schema_migration (name, sha256) values ($1, $2);
